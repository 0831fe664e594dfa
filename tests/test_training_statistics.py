"""Fisher information and Gram matrices against autograd and closed forms."""

import pytest
import torch
from torch import Tensor, nn

from fedtune.errors import DataError
from fedtune.training.merge_statistics import compute_fisher_information, compute_input_grams
from tests.tiny import bert, llama, texts


class Regression(nn.Module):
    """0.5 (w x - y)^2 per example, so that its gradient by w is (w x - y) x."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1, bias=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> "Regression":
        self.loss = 0.5 * (self.line(x)[:, 0] - (0 if labels is None else labels)).square().mean()
        return self


def test_fisher_information_is_the_mean_squared_gradient_of_single_examples() -> None:
    torch.manual_seed(0)
    model, x, labels = Regression(), torch.randn(7, 3), torch.randn(7)
    batches = [{"x": x[:4], "labels": labels[:4]}, {"x": x[4:], "labels": labels[4:]}]
    found = compute_fisher_information(model, batches)
    wanted = ((model.line(x)[:, 0] - labels)[:, None] * x).square().mean(0)
    torch.testing.assert_close(found["line.weight"], wanted[None].detach())
    assert found["unused"].tolist() == [0, 0]


def test_fisher_information_covers_frozen_parameters_and_leaves_the_model_as_it_was() -> None:
    model = bert()
    model.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    before = {name: (one.clone(), one.requires_grad) for name, one in model.named_parameters()}
    found = compute_fisher_information(model, [texts(model)])
    assert found.keys() == before.keys()
    assert float(found["bert.encoder.layer.0.attention.self.query.weight"].sum()) > 0
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name][0])
        assert one.requires_grad is before[name][1]
        assert one.grad is None


def test_fisher_information_does_not_depend_on_how_examples_are_batched() -> None:
    model = llama()
    batch = texts(model, rows=4)
    halves = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    whole, apart = compute_fisher_information(model, [batch]), compute_fisher_information(model, halves)
    for name, tensor in whole.items():
        torch.testing.assert_close(apart[name], tensor)


def test_gram_matrices_are_those_of_the_inputs_of_linear_layers() -> None:
    torch.manual_seed(0)
    model, x = Regression(), torch.randn(9, 3)
    found = compute_input_grams(model, [{"x": x[:5], "labels": x[:5, 0]}, {"x": x[5:], "labels": x[5:, 0]}])
    assert found.keys() == {"line.weight"}
    torch.testing.assert_close(found["line.weight"], x.T @ x / 9)


def test_padding_does_not_enter_gram_matrices() -> None:
    model = bert()
    batch = texts(model, rows=2, length=6)
    short = {**batch, "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    padded = {name: nn.functional.pad(tensor, (0, 3)) for name, tensor in short.items() if name != "labels"}
    found, wanted = (
        compute_input_grams(model, [{**padded, "labels": batch["labels"]}]),
        compute_input_grams(model, [short]),
    )
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_weights_tied_to_an_embedding_have_no_gram_matrix() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert "lm_head.weight" in compute_input_grams(untied, [texts(untied)])
    assert not any("embed" in name or "lm_head" in name for name in compute_input_grams(tied, [texts(tied)]))


@pytest.mark.parametrize("measure", [compute_fisher_information, compute_input_grams])
def test_statistics_of_no_data_are_refused(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(DataError, match=r"^statistics need at least one batch of examples; give some data$"):
        measure(bert(), [])
