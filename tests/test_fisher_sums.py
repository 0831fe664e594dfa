"""Fisher sums: the closed form of a logistic model, sums that add up, and EWC's quadratic around an anchor."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.continual._fisher_sums import (
    FisherKind,
    LabelChoice,
    choose_fisher_kind,
    evaluation_mode,
    iter_single_examples,
    sum_fisher_information,
)
from fedtune.continual._quadratic_penalty import (
    average_sums,
    compute_quadratic_penalty,
    decay_fisher,
    scale_to_unit_mean,
)
from fedtune.recipe.schema import Unit
from fedtune.tasks import get_task
from tests.tiny import few_texts, llama

IMAGES = get_task(Unit(name="image-classification"))
INPUTS, CLASSES, ROWS = 5, 3, 12


class Linear(nn.Module):
    """Class probabilities softmax(W x); dropout shows whether the model is in evaluation mode."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(INPUTS, classes, bias=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.dropout(pixel_values))
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


class Examples:
    domains, lengths = None, None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, INPUTS, generator=generator)
        self.y = torch.randint(CLASSES, (ROWS,), generator=generator)

    def __len__(self) -> int:
        return ROWS

    def make_batch(self, indices: Any) -> dict[str, Tensor]:
        return {"pixel_values": self.x[indices], "labels": self.y[indices]}


def measure(model: nn.Module, rows: Any, kind: FisherKind, classes: list[int] | None = None) -> Tensor:
    singles = iter_single_examples(Examples(), rows)
    choice = LabelChoice(kind, classes, seed=7)
    return sum_fisher_information(model, IMAGES, (), singles, ["head.weight"], choice).sums["head.weight"]


def test_exact_fisher_of_two_classes_is_the_closed_form() -> None:
    """With two classes and one row of weights free, the diagonal is sum_i p_i (1 - p_i) x_i^2."""
    model, x = Linear(2).train(), Examples().x
    p = (x @ model.head.weight.T).softmax(-1)[:, 1].detach()
    wanted = torch.diagonal(x.T @ torch.diag(p * (1 - p)) @ x)
    assert torch.allclose(measure(model, range(ROWS), "exact"), torch.stack([wanted, wanted]), rtol=1e-5)
    assert model.training
    assert model.dropout.training


def test_exact_fisher_is_the_expectation_of_sampled_fisher() -> None:
    model = Linear()
    singles = [batch for batch in iter_single_examples(Examples(), [0, 1]) for _ in range(4000)]
    drawn = sum_fisher_information(model, IMAGES, (), singles, ["head.weight"], LabelChoice("sampled", None, 5))
    assert torch.allclose(drawn.sums["head.weight"] / 4000, measure(model, [0, 1], "exact"), rtol=0.12, atol=0.02)


def test_empirical_fisher_squares_gradients_of_single_examples() -> None:
    """Twin by hand: (p - onehot) x^T squared; squares of the batch's mean gradient would be far smaller."""
    model, data = Linear(), Examples()
    p = (data.x @ model.head.weight.T).softmax(-1).detach() - F.one_hot(data.y, CLASSES)
    wanted = torch.einsum("nc,ni->nci", p, data.x).square().sum(0)
    assert torch.allclose(measure(model, range(ROWS), "empirical"), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_sums_of_clients_are_those_of_all_examples(kind: FisherKind) -> None:
    model = Linear()
    parts = [{"w": measure(model, rows, kind)} for rows in ([3], [0, 1, 2, 11], list(range(4, 11)))]
    together = measure(model, range(ROWS), kind).double() / ROWS
    assert torch.allclose(average_sums(parts, [1, 4, 7])["w"], together, rtol=1e-6)
    assert average_sums([], []) == {}


def test_masked_classes_do_not_count() -> None:
    """With two of three classes allowed, the sums are those of a model with two classes."""
    model, small = Linear(), Linear(2)
    small.head.weight.data = model.head.weight.data[[0, 2]].clone()
    found = measure(model, range(ROWS), "exact", [0, 2])
    assert torch.allclose(found[[0, 2]], measure(small, range(ROWS), "exact"), rtol=1e-5)
    assert not found[1].any()


def test_frozen_parameters_are_measured_and_stay_frozen() -> None:
    model = Linear()
    model.head.weight.requires_grad_(False)
    assert measure(model, range(ROWS), "exact").any()
    assert not model.head.weight.requires_grad
    assert model.head.weight.grad is None


def test_default_kind_follows_the_number_of_classes() -> None:
    assert choose_fisher_kind(IMAGES, range(10)) == "exact"
    assert choose_fisher_kind(IMAGES, range(11)) == "sampled"
    assert choose_fisher_kind(get_task(Unit(name="text-generation")), range(2)) == "empirical"


def test_unit_mean_makes_strength_free_of_scale() -> None:
    raw = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[0.0, 4.0]])}
    small = {name: one * 1e-12 for name, one in raw.items()}
    for name, one in scale_to_unit_mean(raw).items():
        assert torch.allclose(one, raw[name] / 2)
        assert torch.allclose(scale_to_unit_mean(small)[name], one)
    assert not scale_to_unit_mean({"a": torch.zeros(3)})["a"].any()


def test_online_form_decays_old_information() -> None:
    found = decay_fisher({"a": torch.tensor([4.0])}, {"a": torch.tensor([1.0]), "new": torch.tensor([2.0])}, 0.5)
    assert found["a"].item() == 3.0
    assert found["new"].item() == 2.0


def test_penalty_is_the_quadratic_and_its_gradient_pulls_back() -> None:
    model = Linear()
    anchor: Mapping[str, Tensor] = {"head.weight": torch.zeros(CLASSES, INPUTS)}
    fisher = {"head.weight": torch.arange(CLASSES * INPUTS).reshape(CLASSES, INPUTS).float()}
    penalty = compute_quadratic_penalty(model, anchor, fisher, 4.0)
    assert penalty is not None
    weight = model.head.weight.detach().clone()
    assert penalty.item() == pytest.approx(2 * (fisher["head.weight"] * weight**2).sum().item())
    penalty.backward()
    assert torch.allclose(model.head.weight.grad, 4 * fisher["head.weight"] * weight)  # type: ignore[arg-type]
    model.head.weight.requires_grad_(False)
    assert compute_quadratic_penalty(model, anchor, fisher, 4.0) is None


def test_evaluation_mode_restores_each_layer() -> None:
    model = Linear().train()
    model.dropout.eval()
    with evaluation_mode(model):
        assert not model.head.training
    assert model.head.training
    assert not model.dropout.training


def test_texts_are_measured_one_by_one_and_those_of_one_token_do_not_count() -> None:
    """Twin: squared gradients of the mean loss of each text alone, without the padding of a batch."""
    model, data, language = llama(), few_texts(language=True), get_task("text-generation")
    name, singles = "model.layers.0.mlp.up_proj.weight", list(iter_single_examples(data, range(5)))
    wanted = torch.zeros_like(model.get_parameter(name))
    for one in singles:
        model.zero_grad()
        model(**one).loss.backward()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        wanted += gradient.square()
    short = {key: tensor[:, :1] for key, tensor in singles[0].items()}
    found = sum_fisher_information(model, language, (), [*singles, short], [name], LabelChoice("empirical"))
    assert found.num_examples == 5
    torch.testing.assert_close(found.sums[name], wanted)
