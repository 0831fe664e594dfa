"""``mezo``: the step is that of a slow twin, its expectation is the gradient, and it holds what inference holds."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedtune
from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.library.technique_check import check_technique
from fedtune.memory import StorageMeter
from fedtune.plan.prediction import Runtime, predict_memory
from fedtune.plan.settings_trace import BatchTrace, SettingsTrace
from fedtune.profiling import profile_step
from fedtune.recipe.schema import TaskUnit
from fedtune.seeds import derive_seed
from fedtune.techniques.zeroth_order._directions import TrainedTensor, list_trained_tensors, move_weights
from fedtune.techniques.zeroth_order._projected_gradient import ProjectedGradientStep
from fedtune.training import (
    ClientRound,
    LocalTrainingResult,
    get_model_state,
    step_loss,
    train_local_model,
    training_step,
)
from fedtune.training.master_weights import masters_of
from fedtune.training.start import Start
from tests.breaks import kill_and_resume
from tests.families import FAMILIES
from tests.federations import execute, trivial
from tests.profile_examples import a_case, a_recipe, tiny_bert
from tests.streams import CLASSES, resolve_stream
from tests.technique_steps import chosen
from tests.test_plan_trace import a_decoder, compare, with_techniques
from tests.tiny import a_training_recipe, few_texts

SGD = ("train.optimiser=sgd", "train.max_grad_norm=null")
EPSILON = 1e-3


class Steps:
    """Directions whose seeds are their numbers, and what was recorded."""

    def __init__(self, first: int = 0) -> None:
        self.first, self.changes = first, list[float]()

    def get_seed(self, step: int) -> int:
        return self.first + step

    def record_change(self, step: int, change: Tensor) -> None:
        self.changes.append(float(change))


def prepared(family: str, joined: str, dtype: torch.dtype | None = None, **settings: Any) -> tuple[Any, Any, list[str]]:
    model: nn.Module = FAMILIES[family].model()
    model = model if dtype is None else model.to(dtype)
    units = chosen(joined, **settings)
    return model, units, techniques.apply_techniques(units, model, FAMILIES[family].task, 0)


def a_round(
    family: str,
    joined: str,
    dtype: torch.dtype | None = None,
    micro: int | None = None,
    epsilon: float | None = None,
    **own: Any,
) -> LocalTrainingResult:
    model, units, names = prepared(family, joined, dtype, **({} if epsilon is None else {"epsilon": epsilon}))
    settings: dict[str, Any] = {"local_steps": 2, "batch_size": 4, "optimiser": "sgd", "lr": 1e-3, **own}
    client = ClientRound(
        model,
        units,
        a_training_recipe(**settings).model_copy(update={"task": TaskUnit(name=FAMILIES[family].task.name)}),
        few_texts(language=not FAMILIES[family].task.has_classes),
        np.arange(8),
        1,
        1,
        micro_batch_size=micro,
    )
    return train_local_model(client, get_model_state(model, names))


def draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("family", ["bert", "opt"])
@pytest.mark.parametrize("joined", ["mezo+full", "lora+mezo"])
def test_a_step_is_that_of_a_slow_twin_with_dropout_on(family: str, joined: str) -> None:
    """In double precision; the twin copies all weights, and draws whole tensors in the order of their names."""
    (model, _, _), (twin, _, _) = (prepared(family, joined, torch.float64) for _ in range(2))
    batch = FAMILIES[family].make_batch()
    model.train(), twin.train()
    start = {name: one.detach().clone() for name, one in twin.named_parameters() if one.requires_grad}
    generator = torch.Generator().manual_seed(7)
    z = {name: draw(start[name].shape, generator).double() for name in sorted(start)}
    losses = []
    for sign in (1, -1):
        for name, one in twin.named_parameters():
            if name in start:
                one.data = start[name] + sign * EPSILON * z[name]
        torch.manual_seed(3)
        losses.append(float(twin(**batch).loss.detach()))
    slope = (losses[0] - losses[1]) / (2 * EPSILON)
    step, directions = make_step(model, 7)
    torch.manual_seed(3)
    loss = step.estimate_slope(lambda: model(**batch).loss)
    step.step(0.1)
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=1e-6)
    [change] = directions.changes
    assert change == pytest.approx(-0.1 * slope, abs=1e-7 if family == "bert" else 1e-4)  # opt's loss is single
    assert abs(slope) > 0.02
    found = dict(model.named_parameters())
    assert all(torch.allclose(found[name], start[name] + change * z[name], rtol=0, atol=1e-7) for name in start)
    assert all(parameter.grad is None for parameter in model.parameters())


def make_step(model: nn.Module, first: int) -> tuple[ProjectedGradientStep, Steps]:
    directions, masters = Steps(first), masters_of(model, Start(model, ()))
    return ProjectedGradientStep(list_trained_tensors(model, masters), EPSILON, directions), directions


def test_the_mean_over_directions_is_the_gradient_of_a_quadratic() -> None:
    """On a quadratic the slope is g z exactly, so entry i of the mean has the variance (|g|^2 + g_i^2) / n."""
    random = torch.Generator().manual_seed(1)
    root, centre = torch.randn(6, 6, generator=random).double(), torch.randn(6, generator=random).double()
    w = torch.zeros(6, dtype=torch.float64)
    gradient, count = root.T @ root @ (w - centre), 4000
    step = ProjectedGradientStep([TrainedTensor(w)], EPSILON, directions := Steps())
    mean = torch.zeros(6, dtype=torch.float64)
    for number in range(count):
        w.zero_()
        step.estimate_slope(lambda: (root @ (w - centre)).square().sum() / 2)
        step.step(1.0)
        mean -= w / count
        z = torch.randn(6, generator=torch.Generator().manual_seed(number)).double()
        assert directions.changes[-1] == pytest.approx(-float(gradient @ z), rel=1e-4, abs=1e-4)
    bound = 5 * ((gradient.square().sum() + gradient.square()) / count).sqrt()
    assert ((mean - gradient).abs() <= bound).all()
    assert (bound < 0.2 * gradient.norm()).all()


def compute_loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(**FAMILIES["opt"].make_batch()).loss
    return loss.float()


@pytest.mark.parametrize("joined", ["mezo+full", "lora+mezo"])
def test_weights_return_within_the_bound_and_with_master_copies_exactly(joined: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, _, _ = prepared("opt", joined, dtype)
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        step, _ = make_step(model, 0)
        step.estimate_slope(partial(compute_loss, model))
        for name, one in model.named_parameters():
            moved = (one.detach().double() - before[name].double()).abs()
            bound = 3 * 2.0**-24 * (before[name].double().abs() + 6 * EPSILON) if dtype == torch.float32 else 0.0
            assert (moved <= bound).all(), name


def test_large_tensors_are_drawn_in_pieces_of_one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece goes on where the last one ended, scalars and tensors with other strides included."""
    from fedtune.techniques.zeroth_order import _directions

    monkeypatch.setattr(_directions, "_PIECE", 40)
    tensors = [torch.zeros(10, 16).T, torch.zeros(()), torch.zeros(3, 50), torch.zeros(7)]
    move_weights([TrainedTensor(one) for one in tensors], 5, 2.0)
    generator = torch.Generator().manual_seed(5)
    pieces = [draw(one.shape, generator) for one in tensors[0].split(4)]
    assert torch.equal(tensors[0], 2 * torch.cat(pieces))
    assert torch.equal(tensors[1], 2 * draw(torch.Size(()), generator))
    assert torch.equal(tensors[2], 2 * torch.cat([draw(torch.Size((1, 50)), generator) for _ in range(3)]))
    assert torch.equal(tensors[3], 2 * draw(torch.Size((7,)), generator))


@pytest.mark.parametrize("joined", ["mezo+full", "mezo+lora", "mezo+badam", "mezo+full+fused-cross-entropy"])
def test_a_round_repeats_and_micro_batches_have_the_slope_of_the_batch(joined: str) -> None:
    """The loss is in single precision, so a larger epsilon leaves more digits of the slope."""
    whole, again, halves = (a_round("qwen2", joined, micro=micro, epsilon=0.02) for micro in (None, None, 2))
    assert all(torch.equal(whole.delta[name], again.delta[name]) for name in whole.delta)
    assert any(bool(one.any()) for one in whole.delta.values())
    assert whole.activation_bytes <= 16
    scale = max(float(one.abs().max()) for one in whole.delta.values())
    assert all(torch.allclose(whole.delta[name], halves.delta[name], atol=0.05 * scale) for name in whole.delta)


def test_where_memory_ends_a_step_begins_again_with_its_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = step_loss.compute_step_loss, list[int]()

    def fail(task: Any, model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch["labels"]))
        if calls[-1] > 2 and len(calls) == 2:  # in the second pass of the first step
            raise MemoryError
        return real(task, model, batch)

    wanted = a_round("opt", "lora+mezo", micro=2, lr=1e-2)
    monkeypatch.setattr(training_step, "compute_step_loss", fail)
    with pytest.warns(UserWarning, match="in micro-batches of 2"):
        found = a_round("opt", "lora+mezo", lr=1e-2)
    assert calls[:2] == [4, 4]
    scale = max(float(one.abs().max()) for one in wanted.delta.values())
    assert all(torch.allclose(found.delta[name], wanted.delta[name], atol=0.1 * scale) for name in wanted.delta)


def measure(run: Callable[[], Any], model: nn.Module) -> int:
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        run()
    return meter.peak_bytes


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_step_holds_what_inference_holds(family: str) -> None:
    model, _, _ = prepared(family, "mezo+full")
    batch = FAMILIES[family].make_batch(rows=32, length=30)
    step, _ = make_step(model, 0)
    with torch.no_grad():
        inference = measure(lambda: model.eval()(**batch).loss, model)
    peak = measure(lambda: step.estimate_slope(lambda: model.eval()(**batch).loss), model)
    assert peak <= 1.1 * inference
    trained = measure(lambda: model(**batch).loss.backward(), model)
    assert trained > 3 * inference


def test_a_loss_in_half_precision_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the loss is computed in bfloat16.*set model\.dtype: float32"):
        a_round("bert", "mezo+full", torch.bfloat16)
    assert a_round("opt", "mezo+full", torch.bfloat16).train_loss > 0


@pytest.mark.parametrize("joined", ["mezo+full", "lora+mezo"])
def test_the_plan_and_the_profile_hold_the_bytes_of_the_real_step(joined: str, tmp_path: Path) -> None:
    recipe = with_techniques(a_recipe(tiny_bert(tmp_path), *SGD), joined)
    compare(recipe, ("a", "b", "c"))
    found = profile_step(a_case(recipe, joined, check=True))
    assert found.gradient_error is None
    assert found.kept_bytes <= 16 < found.peak_bytes


def test_a_decoder_is_planned_at_a_few_blocks(tmp_path: Path) -> None:
    compare(with_techniques(a_recipe(a_decoder(tmp_path), "task=text-generation", *SGD), "full+mezo"), (), slack=0.03)


def test_a_plan_counts_neither_gradients_nor_an_optimiser() -> None:
    trace = SettingsTrace(techniques=["full"], dtype="float32", trained_values=1000)
    batches = [BatchTrace(examples=n, kept_bytes=0, peak_bytes=9000, step_bytes=9000, flops=n) for n in (1, 2)]
    plain = trace.model_copy(update={"batches": batches})
    without = plain.model_copy(update={"needs_gradients": False})
    for batch, gradients in zip(batches, (4000, 0), strict=True):  # those of a whole batch are in its trace
        held, estimated = (predict_memory(one, batch, Runtime(0, 0), "adamw", 0.0) for one in (plain, without))
        assert held.anonymous_bytes - estimated.anonymous_bytes == 8000 + gradients


def test_a_killed_run_ends_with_the_bits_of_one_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = trivial("train.techniques=[full, mezo]", *SGD, "train.lr=0.01", "data.max_train_examples=80")
    alone = execute(recipe, run="alone")
    killed = kill_and_resume(recipe, monkeypatch)
    assert alone.run.status == killed.run.status == "completed"
    assert killed.hashes == alone.hashes
    assert len(set(alone.hashes)) == 3


@pytest.mark.parametrize("algorithm", ["fednova", "moon", "fedlc", "q-fedavg"])
def test_algorithms_without_gradients_train_with_it(home: Path, algorithm: str) -> None:
    more = ("train.lr=0.01", "data.max_train_examples=80", "federation.rounds=1", f"federation.algorithm={algorithm}")
    ended = execute(trivial("train.techniques=[full, mezo]", *SGD, *more))
    assert ended.run.status == "completed"
    assert len(set(ended.hashes)) == 2


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.optimiser=adamw"], "adamw needs gradients; set train.optimiser: sgd"),
        (["train.optimiser=lomo"], "lomo needs gradients; set train.optimiser: sgd"),
        (["train.momentum=0.9"], "train.momentum: mezo moves weights along random directions alone"),
        (["train.weight_decay=0.1"], "train.weight_decay: mezo moves"),
        (["train.max_grad_norm=1.0"], "train.max_grad_norm: mezo moves"),
        (["federation.algorithm=scaffold"], "scaffold corrects gradients, and mezo computes none"),
        (["federation.algorithm=fedprox"], "fedprox corrects gradients, and mezo computes none"),
        (["train.techniques=[full, mezo, gradient-checkpointing]"], "mezo runs no backward pass"),
        (["train.techniques=[mezo]"], "trains nothing; add full"),
        (["train.techniques={full: {}, mezo: {epsilon: 0}}"], "epsilon"),
    ],
)
def test_what_needs_gradients_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        trivial("train.techniques=[full, mezo]", *SGD, *overrides)


def test_streams_with_memory_and_own_loops_are_refused() -> None:
    train = {"techniques": ["full", "mezo"], "optimiser": "sgd", "lr": 0.01, "local_steps": 1}
    with pytest.raises(RecipeError, match="ewc may work with gradients, and mezo computes none"):
        resolve_stream({**CLASSES, "memory": ["ewc"]}, train=train)
    assert resolve_stream(CLASSES, train=train).stream is not None
    with pytest.raises(
        RecipeError, match=r"mezo takes its steps in a round of fedtune.*train it with fedtune\.simulate"
    ):
        fedtune.prepare(FAMILIES["bert"].model(), "full+mezo", task="text-classification")


def test_seeds_of_a_round_differ_from_step_to_step_and_client_to_client() -> None:
    seeds = {
        derive_seed(derive_seed(0, 1, client, "directions"), step) % 2**32 for client in range(9) for step in range(99)
    }
    assert len(seeds) == 9 * 99


@pytest.mark.parametrize("name", ["mezo", "fedkseed"])
def test_a_check_of_the_technique_says_that_it_takes_the_steps(name: str) -> None:
    [found] = check_technique(name)
    assert (found.status, found.reason) == ("skipped", "it takes the steps of a round itself, without a backward pass")
