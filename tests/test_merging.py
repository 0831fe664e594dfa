from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.memory import StorageMeter
from fedtune.merging import CombineStep, MergeInput, MergePipeline, Shape, build_pipeline, merge_client_updates
from fedtune.merging.combine.mean import Mean
from fedtune.recipe.schema import Unit
from fedtune.wire import client_update
from fedtune.wire.client_update import ClientUpdate, pack

SHAPES = {"scalar": (), "bias": (7,), "weight": (33, 5), "kernel": (4, 3, 2, 2), "none": (0, 3)}


def a_state(shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def spool(folder: Path, client: int, examples: int, deltas: dict[str, Tensor]) -> ClientUpdate:
    path = folder / f"{client}.safetensors"
    path.write_bytes(pack(deltas))
    return ClientUpdate(client, examples, path)


def several(folder: Path, examples: Sequence[int], shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[ClientUpdate]:
    return [spool(folder, client, n, a_state(shapes, client + 1)) for client, n in enumerate(examples)]


def alone(combine: CombineStep) -> MergePipeline:
    return MergePipeline((), combine, (), ())


def combined(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of deltas held in memory."""
    operands = [
        MergeInput(lambda name, start, stop, delta=delta: delta[start:stop], weight)
        for delta, weight in zip(deltas, weights, strict=True)
    ]
    return torch.cat(list(Mean().combine("a", tuple(deltas[0].shape), operands)))


def readable_twin(state: dict[str, Tensor], deltas: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """state + sum_i w_i delta_i, whole tensors, all in double precision."""
    merged = {}
    for name, before in state.items():
        total = torch.zeros(before.shape, dtype=torch.float64)
        for delta, weight in zip(deltas, weights, strict=True):
            total = total + weight * delta[name].double()
        merged[name] = before.double() + total
    return merged


def assert_close(merged: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=0, atol=5e-7)


@pytest.mark.parametrize("piece", [1, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("weight", "weights"), [("examples", [0.1, 0.2, 0.7]), ("equal", [1 / 3, 1 / 3, 1 / 3])], ids=["examples", "equal"]
)
def test_the_mean_is_the_twin_whatever_the_piece(
    tmp_path: Path, weight: str, weights: list[float], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_update, "_PIECE", piece)
    step = build_pipeline([Unit(name="mean", settings={"weight": weight})])
    merged = merge_client_updates(step, a_state(), SHAPES, several(tmp_path, [10, 20, 70]))
    assert_close(merged, readable_twin(a_state(), [a_state(seed=seed) for seed in (1, 2, 3)], weights))


def test_the_bits_do_not_depend_on_the_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = several(tmp_path, [3, 5, 11])
    whole = merge_client_updates(alone(Mean()), a_state(), SHAPES, sent)
    monkeypatch.setattr(client_update, "_PIECE", 2)
    pieces = merge_client_updates(alone(Mean()), a_state(), SHAPES, sent)
    assert all(torch.equal(whole[name], pieces[name]) for name in SHAPES)


def test_a_tensor_larger_than_a_piece_is_merged_to_its_end(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"wide": (3, 700_000), "long": (2_500_000,)}
    assert all(torch.Size(shape).numel() > 2 * client_update._PIECE for shape in shapes.values())
    merged = merge_client_updates(alone(Mean()), a_state(shapes), shapes, several(tmp_path, [1, 3], shapes))
    assert_close(merged, readable_twin(a_state(shapes), [a_state(shapes, 1), a_state(shapes, 2)], [0.25, 0.75]))


@pytest.mark.parametrize("arrival", [[3, 2, 1, 0], [2, 0, 3, 1], [0, 2, 1, 3]])
def test_the_bits_do_not_depend_on_who_answers_first(tmp_path: Path, arrival: list[int]) -> None:
    deltas = [torch.tensor([value]) for value in (2.0**60, 1.0, -(2.0**60), 0.5)]
    sent = [spool(tmp_path, client, 1, {"a": delta}) for client, delta in enumerate(deltas)]
    in_order = merge_client_updates(alone(Mean()), {"a": torch.zeros(1)}, ["a"], sent)
    as_arrived = merge_client_updates(alone(Mean()), {"a": torch.zeros(1)}, ["a"], [sent[client] for client in arrival])
    assert torch.equal(in_order["a"], as_arrived["a"])


def test_a_sum_in_another_order_would_have_other_bits() -> None:
    deltas = [torch.tensor([value]) for value in (2.0**60, 1.0, -(2.0**60), 0.5)]
    sums = {float(combined([deltas[k] for k in order], [0.25] * 4)) for order in ([0, 1, 2, 3], [0, 2, 1, 3])}
    assert sums == {0.125, 0.375}


def test_one_client_alone_is_followed_exactly(tmp_path: Path) -> None:
    merged = merge_client_updates(alone(Mean()), a_state(), SHAPES, [spool(tmp_path, 4, 17, a_state(seed=9))])
    assert all(torch.equal(merged[name], a_state()[name] + a_state(seed=9)[name]) for name in SHAPES)


def test_tensors_that_were_not_sent_stay_and_the_state_before_is_not_touched(tmp_path: Path) -> None:
    state = a_state()
    sent = several(tmp_path, [1, 2], {"weight": SHAPES["weight"]})
    merged = merge_client_updates(alone(Mean()), state, ["weight"], sent)
    assert all(torch.equal(state[name], before) for name, before in a_state().items())
    assert all(torch.equal(merged[name], state[name]) for name in SHAPES if name != "weight")
    assert not torch.equal(merged["weight"], state["weight"])


def test_weights_are_shares_of_the_examples_or_equal() -> None:
    assert Mean().compute_client_weights([1, 3]) == [0.25, 0.75]
    assert Mean(weighting="equal").compute_client_weights([1, 3]) == [0.5, 0.5]
    assert sum(Mean().compute_client_weights([10**9, 1, 7])) == pytest.approx(1.0, abs=1e-15)


def test_small_and_large_deltas_are_summed_in_double_precision() -> None:
    deltas = [torch.tensor([value]) for value in (3e7, 1.0, -3e7, 1.0)]
    assert combined(deltas, [1.0] * 4).item() == 2.0
    assert sum(deltas, torch.zeros(1)).item() != 2.0


def test_combining_changes_no_delta() -> None:
    first = torch.ones(2)
    assert torch.equal(combined([first, torch.full((2,), 3.0)], [0.5, 0.5]), torch.full((2,), 2.0))
    assert torch.equal(first, torch.ones(2))


def test_exactly_one_step_may_combine() -> None:
    assert build_pipeline([Unit(name="mean")]) == alone(Mean())
    with pytest.raises(RecipeError, match=r"^merge: 2 steps combine, but exactly one must; keep or add one, e.g. mean"):
        build_pipeline([Unit(name="mean"), Unit(name="mean")])
    with pytest.raises(RecipeError, match=r"^merge: 0 steps combine"):
        build_pipeline([])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


FACTORS: dict[str, tuple[int, ...]] = {"B": (24, 4), "A": (4, 16)}


def merged_and_mean_product(folder: Path, sent: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The merged product, and the weighted mean of the clients' products, when clients train the factors ``sent``."""
    start, examples = a_state(FACTORS), [3, 10, 17]
    clients = [{name: a_state(FACTORS, seed)[name] for name in sent} for seed in (1, 2, 3)]
    spooled = [spool(folder, k, n, deltas) for k, (n, deltas) in enumerate(zip(examples, clients, strict=True))]
    merged = merge_client_updates(alone(Mean()), start, sent, spooled)
    mean = torch.zeros(24, 16, dtype=torch.float64)
    for n, deltas in zip(examples, clients, strict=True):
        own = {name: (start[name] + deltas.get(name, torch.zeros(()))).double() for name in FACTORS}
        mean += n / sum(examples) * own["B"] @ own["A"]
    return merged["B"].double() @ merged["A"].double(), mean


@pytest.mark.parametrize("factor", ["A", "B"])
def test_low_rank_products_are_averaged_exactly_when_one_factor_is_common(tmp_path: Path, factor: str) -> None:
    product, mean = merged_and_mean_product(tmp_path, [factor])
    assert relative(product, mean) < 1e-6


def test_averaging_both_factors_is_not_exact(tmp_path: Path) -> None:
    product, mean = merged_and_mean_product(tmp_path, ["A", "B"])
    assert relative(product, mean) > 0.1


class Greedy(Mean):
    """A planted fault: it holds every delta at once."""

    name: ClassVar[str] = "greedy"

    def combine(self, name: str, shape: Shape, operands: Sequence[MergeInput]) -> Iterator[Tensor]:
        held = [operand.read_rows(name, 0, shape[0]) for operand in operands]
        yield from super().combine(name, shape, operands)
        del held


def peak(step: Mean, folder: Path, count: int) -> int:
    shapes: dict[str, tuple[int, ...]] = {"a": (600, 500), "b": (600, 500)}
    state, sent = a_state(shapes), several(folder, [1] * count, shapes)
    with StorageMeter(excluded=state.values()) as meter:
        merge_client_updates(alone(step), state, shapes, sent)
    return meter.peak_bytes


def test_the_peak_does_not_grow_with_the_number_of_contributions(tmp_path: Path) -> None:
    assert peak(Mean(), tmp_path, 16) <= 1.05 * peak(Mean(), tmp_path, 2)
    assert peak(Greedy(), tmp_path, 16) > 2 * peak(Greedy(), tmp_path, 2)
