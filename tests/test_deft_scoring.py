from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import OPTForCausalLM, PreTrainedModel

from fedtune import techniques
from fedtune.techniques import Technique
from fedtune.techniques.deft._density_probe import calibrate_thresholds
from fedtune.techniques.deft.deft import get_probes
from fedtune.training import EvaluatedModel, evaluate_model
from tests.deft_models import opt, relu_bert, relu_llama
from tests.deft_twin import activations, deft
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, logits
from tests.tiny import bert, few_texts, llama, texts


def _applied(model: PreTrainedModel, **settings: Any) -> tuple[Technique, ...]:
    chosen = deft("full", **settings)
    techniques.apply_techniques(chosen, model, LANGUAGE if "CausalLM" in type(model).__name__ else TEXT, 0)
    return chosen


def _scored(model: PreTrainedModel, chosen: tuple[Technique, ...], batch: int) -> dict[str, float]:
    language = "CausalLM" in type(model).__name__
    found = evaluate_model(
        EvaluatedModel(model, LANGUAGE if language else TEXT, batch, chosen),
        few_texts(language=language, domains=False),
    )
    return {one.name: one.value for one in found}


def _counted_by_hand(model: PreTrainedModel, threshold: float = 0.0, *, padding: bool = False) -> float:
    """Every entry of every layer looked at one by one, all texts in one batch."""
    data = few_texts(language=True)
    inputs = data.make_batch(torch.argsort(data.lengths, stable=True).tolist() if data.lengths is not None else [])
    with activations(model) as seen, torch.no_grad():
        model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    real = [padding or bool(one) for one in inputs["attention_mask"].flatten()]
    shares = []
    for a in seen:
        entries = [value for row, counts in zip(a.tolist(), real, strict=True) if counts for value in row]
        shares.append(sum(abs(value) > threshold for value in entries) / len(entries))
    return float(np.mean(shares))


@pytest.mark.parametrize("build", [opt, relu_bert, relu_llama])
def test_the_density_is_what_a_loop_over_all_entries_counts(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    found = _scored(model, _applied(model), batch=12)
    assert found["density"] == pytest.approx(_counted_by_hand(build()), rel=1e-12)
    assert found["density_padded"] == pytest.approx(_counted_by_hand(build(), padding=True), rel=1e-12)
    assert 0.3 < found["density"] < 0.7
    assert found["density"] != found["density_padded"]


@pytest.mark.parametrize("build", [relu_bert, relu_llama])
def test_uneven_batches_give_the_density_of_one_pass(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    chosen = _applied(model)
    whole, uneven = (_scored(model, chosen, batch) for batch in (12, 5))
    assert uneven["density"] == pytest.approx(whole["density"], abs=1e-3)  # other padding, other last bits
    assert abs(uneven["density_padded"] - whole["density_padded"]) > 10 * abs(uneven["density"] - whole["density"])


def test_the_gate_of_a_gated_mlp_is_counted_apart() -> None:
    model = relu_llama()
    found = _scored(model, _applied(model), batch=12)
    assert found["density_gate"] == pytest.approx(found["density"], abs=1e-3)
    smooth = llama()
    assert _scored(smooth, _applied(smooth), batch=12)["density_gate"] == 1.0


@pytest.mark.parametrize("build", [bert, opt, llama])
def test_a_threshold_is_applied_and_its_density_is_that_of_the_model_scored(
    build: Callable[[], PreTrainedModel],
) -> None:
    threshold = _median(build())
    model = build()
    batch = {name: one for name, one in texts(llama()).items() if name != "labels"}
    plain = logits(model, batch)
    chosen = _applied(model, threshold=threshold)
    found = _scored(model, chosen, batch=12)
    assert found["density_above_threshold"] == pytest.approx(_counted_by_hand(build(), threshold), rel=0.02)
    assert 0.3 < found["density_above_threshold"] < 0.7
    with activations(model) as seen:
        thresholded = logits(model, batch)
    assert not torch.allclose(thresholded, plain)
    assert all(float(a[a != 0].abs().min()) > threshold for a in seen)
    techniques.begin_step(chosen, model, batch, 1.0)
    torch.manual_seed(0)
    with activations(model.train()) as seen:
        model(**batch)
    assert any(float(a[a != 0].abs().detach().min()) < threshold for a in seen)


def _median(model: PreTrainedModel) -> float:
    inputs = few_texts().make_batch(range(12))
    with activations(model) as seen, torch.no_grad():
        model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    values = torch.cat([a[a != 0].abs() for a in seen])
    middle = values.kthvalue(10) if isinstance(model, OPTForCausalLM) else values.median(0)
    return float(middle.values)


@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_the_magnitude_control_keeps_the_wanted_share_of_each_layer(kept: float) -> None:
    model = llama()
    chosen = _applied(model, alpha=0.0)
    batch = {name: one for name, one in few_texts(language=True).make_batch(range(12)).items() if name != "labels"}
    calibrate_thresholds(model, get_probes(model), [batch], kept)
    techniques.begin_step(chosen, model, batch, 1.0)
    with techniques.collect_metrics(chosen, model) as figures:
        logits(model, batch)
        tallies = [probe.tally for probe in get_probes(model)]
        figures()
    assert all(tally is not None and tally.above / tally.entries == pytest.approx(kept, abs=0.01) for tally in tallies)


def test_the_magnitude_control_zeroes_the_smallest_and_leaves_the_rest() -> None:
    model = llama()
    _applied(model, alpha=0.0)
    batch = {name: one for name, one in texts(model).items() if name != "labels"}
    with activations(model) as seen:
        logits(model, batch)
    before = seen[0]
    calibrate_thresholds(model, get_probes(model), [batch], 0.25)
    with activations(model) as seen:
        logits(model, batch)
    after = seen[0]
    largest = before.abs() > before.abs().flatten().kthvalue(round(0.75 * before.numel())).values
    assert torch.equal(after, before * largest)


def test_a_narrowing_product_that_skips_zeros_equals_the_dense_one() -> None:
    model = opt()
    layer = model.get_submodule("model.decoder.layers.0.fc2")
    with activations(model) as seen:
        logits(model, {name: one for name, one in texts(llama()).items() if name != "labels"})
    dense = layer(seen[0])
    skipping = torch.stack([_skipping_zeros(layer.weight, layer.bias, row) for row in seen[0]])  # type: ignore[arg-type]
    assert 0.3 < float((seen[0] != 0).float().mean()) < 0.7
    torch.testing.assert_close(skipping, dense, rtol=1e-5, atol=1e-6)


def _skipping_zeros(weight: Tensor, bias: Tensor, row: Tensor) -> Tensor:
    active = row.nonzero()[:, 0]
    return weight.T.index_select(0, active).T @ row[active] + bias


def test_figures_of_a_plain_model_name_no_threshold_and_no_gate() -> None:
    model = bert()
    found = _scored(model, _applied(model), batch=12)
    assert {name for name in found if "density" in name} == {"density", "density_padded"}


class TwoStacks(nn.Module):
    """Two lists of blocks at the top of a model, as some checkpoints have them."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
        self.first, self.second = (nn.ModuleList([block]) for block in blocks)
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = pixel_values
        for block in (*self.first, *self.second):
            x = x + block(x)
        return SimpleNamespace(logits=self.head(x), loss=None)


def test_two_lists_of_blocks_at_the_top_are_told_apart() -> None:
    torch.manual_seed(0)
    model = TwoStacks()
    chosen = deft("full")
    techniques.apply_techniques(chosen, model, IMAGES, 0)
    techniques.begin_round(chosen, model, 1)
    with techniques.collect_metrics(chosen, model) as figures, torch.no_grad():
        model.eval()(torch.randn(5, 4))
        found = figures()
    assert set(found) == {f"{name}_{stack}" for name in ("density", "density_padded") for stack in ("first", "second")}
    assert found["density_first"] != found["density_second"]
