"""Task vectors: which entries are kept, how they are rescaled, and which sign wins."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import MergeInput
from fedtune.merging.combine.task_vectors._magnitude_selection import (
    count_entries_to_keep,
    find_threshold,
    keep_largest,
    keep_magnitude_band,
)
from fedtune.merging.combine.task_vectors._task_vector_step import sum_with_elected_sign
from fedtune.wire import client_update
from fedtune.wire.client_update import iter_row_chunks
from tests.merge_examples import SHAPES, Held, a_model, a_step, merged, models

WEIGHTS = [0.5, 0.3, 0.2]


@pytest.fixture(params=["partitioned", "counted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short streams are partitioned, long ones counted."""
    if request.param == "counted":
        monkeypatch.setattr("fedtune.merging.combine.task_vectors._magnitude_selection._SHORT", 0)


def stream(values: Tensor, piece: int) -> Iterator[Tensor]:
    for start in range(0, len(values), piece):
        yield values[start : start + piece, None]


def kept(values: Tensor, keep: int, piece: int = 7) -> Tensor:
    found = torch.cat(list(keep_largest(lambda: stream(values, piece), keep, len(values))()))[:, 0]
    return found.nonzero()[:, 0]


def by_sorting(values: Tensor, keep: int) -> Tensor:
    """The twin: a stable descending sort."""
    return values.abs().argsort(descending=True, stable=True)[:keep].sort().values


def hard_values() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(500, generator=random)
    return {
        "normal": normal,
        "ties": (normal * 3).round() + 10,
        "equal": torch.full((500,), -0.3),
        "one bin": 1 + normal.abs() * 1e-4,
        "tiny": normal * 1e-42,
        "huge": normal * 1e37,
        "bfloat16": normal.bfloat16().float(),
        "mostly zero": normal * (torch.arange(500) % 50 == 0),
    }


@pytest.mark.parametrize("name", hard_values())
@pytest.mark.parametrize("keep", [1, 2, 99, 250, 499])
def test_the_largest_are_those_of_a_stable_sort(name: str, keep: int, way: None) -> None:
    values = hard_values()[name]
    wanted = by_sorting(values, keep)
    assert torch.equal(kept(values, keep), wanted[values[wanted] != 0])
    chosen = torch.cat(
        [
            mask(piece)
            for mask in [find_threshold(lambda: stream(values, 7), keep, 500).make_mask_function()]
            for piece in stream(values, 7)
        ]
    )
    assert torch.equal(chosen[:, 0].nonzero()[:, 0], wanted)


@pytest.mark.parametrize("name", hard_values())
def test_a_band_is_the_middle_of_a_stable_sort(name: str, way: None) -> None:
    values = hard_values()[name]
    found = torch.cat(list(keep_magnitude_band(lambda: stream(values, 11), 40, 300, len(values))()))[:, 0]
    order = values.abs().argsort(descending=True, stable=True)
    wanted = torch.zeros(500).scatter_(0, order[40:300], values[order[40:300]])
    assert torch.equal(found, wanted)


def test_zeros_are_kept_last_and_infinities_first(way: None) -> None:
    values = torch.tensor([0.0, -math.inf, 1.0, -0.0, math.inf])
    assert kept(values, 2).tolist() == [1, 4]


@pytest.mark.parametrize(("density", "size", "count"), [(0.2, 64, 12), (0.9, 64, 57), (0.9, 576, 518), (0.01, 3, 1)])
def test_the_share_kept_is_rounded_down_but_never_to_none(density: float, size: int, count: int) -> None:
    assert count_entries_to_keep(density, size) == count
    assert count_entries_to_keep(density, 0) == 0


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs-ties"])
@pytest.mark.parametrize("size", [1, 2, 3, 64, 576])
@pytest.mark.parametrize("density", [0.2, 0.9])
def test_exactly_the_share_of_entries_is_kept(name: str, size: int, density: float) -> None:
    found = merged(a_step(name, {"density": density}), [a_model(1, {"w": (size,)})])["w"]
    assert int(found.count_nonzero()) == max(1, math.floor(density * size))


def test_breadcrumbs_drops_the_largest_too() -> None:
    values = torch.arange(1.0, 101)
    found = merged(a_step("breadcrumbs", {"density": 0.5, "gamma": 0.1}), [{"w": values}])["w"]
    assert found.nonzero()[:, 0].tolist() == list(range(40, 90))


def test_breadcrumbs_drops_fewer_of_the_largest_where_both_do_not_fit() -> None:
    found = merged(a_step("breadcrumbs", {"density": 0.95, "gamma": 0.5}), [{"w": torch.arange(1.0, 101)}])["w"]
    assert found.nonzero()[:, 0].tolist() == list(range(95))


def ties_twin(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Trim, elect and average, entry by entry."""
    trimmed = []
    for delta in deltas:
        chosen = by_sorting(delta.flatten(), max(1, math.floor(density * delta.numel())))
        trimmed.append(torch.zeros(delta.numel()).scatter_(0, chosen, delta.flatten()[chosen]).tolist())
    found = []
    for entries in zip(*trimmed, strict=True):
        weighed = [(w * x, w) for w, x in zip(weights, entries, strict=True)]
        sign = 1 if sum(x for x, _ in weighed) >= 0 else -1
        agreeing = [(x, w) for x, w in weighed if x * sign > 0]
        found.append(sum(x for x, _ in agreeing) / sum(w for _, w in agreeing) if agreeing else 0.0)
    return torch.tensor(found).reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "none"])
def test_ties_is_the_twin(name: str, density: float) -> None:
    found = merged(a_step("ties", {"density": density}), models(3), WEIGHTS)[name]
    twin = ties_twin([model[name] for model in models(3)], WEIGHTS, density)
    torch.testing.assert_close(found, twin, rtol=1e-6, atol=1e-6)


def rescaled_twin(values: Tensor, density: float, gamma: float) -> Tensor:
    """A band of a stable sort, stretched entry by entry until its magnitudes add up to those of all entries."""
    size = values.numel()
    keep = max(1, math.floor(density * size))
    top = min(math.floor(gamma * size), size - keep)
    order = sorted(range(size), key=lambda place: -abs(float(values.flatten()[place])))[top : top + keep]
    found = {place: float(values.flatten()[place]) for place in order}
    before, after = (math.fsum(map(abs, some)) for some in (values.flatten().tolist(), found.values()))
    ratio = before / after if min(before, after) >= 1e-7 else 1.0
    return torch.tensor([ratio * found.get(place, 0.0) for place in range(size)]).reshape(values.shape)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.95, 1.0])
@pytest.mark.parametrize(("name", "gamma"), [("ties", 0.0), ("breadcrumbs", 0.1), ("breadcrumbs-ties", 0.02)])
def test_rescale_is_the_twin(
    name: str, gamma: float, density: float, fits: bool, way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_update, "_PIECE", 64)
    monkeypatch.setattr("fedtune.merging.combine.task_vectors._delta_cache._BUDGET", 1 << 24 if fits else 0)
    settings = {"density": density, "rescale": True, "normalise": False, **({"gamma": gamma} if gamma else {})}
    deltas = {key: value for key, value in a_model(3, SHAPES).items() if key != "none"}
    found = merged(a_step(name, settings), [deltas])
    for key, values in deltas.items():
        twin = rescaled_twin(values, density, gamma)
        torch.testing.assert_close(found[key], twin, rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs-ties"])
def test_rescale_leaves_what_is_next_to_nothing(name: str) -> None:
    for values in (torch.full((10,), 1e-9), torch.zeros(10), torch.tensor([1.0] + 9 * [0.0])):
        settings = {"density": 0.2, **({"gamma": 0.1} if "bread" in name else {})}
        one, other = (merged(a_step(name, {**settings, "rescale": on}), [{"w": values}])["w"] for on in (True, False))
        assert torch.equal(one, other)


def test_each_model_is_rescaled_by_itself() -> None:
    deltas = models(3)
    step = a_step("ties", {"density": 0.3, "rescale": True, "normalise": False})
    found = merged(step, deltas, WEIGHTS)["weight"]
    parts = [weight * merged(step, [one])["weight"] for weight, one in zip(WEIGHTS, deltas, strict=True)]
    agreeing = torch.stack(parts) * torch.stack(parts).sum(0).sign()
    torch.testing.assert_close(found.abs(), agreeing.clamp_min(0).sum(0), rtol=1e-6, atol=1e-7)


def test_a_tied_election_goes_to_plus_and_entries_that_were_dropped_have_no_vote() -> None:
    parts = [torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[-2.0, 0.0, -3.0]]), torch.tensor([[0.0, 5.0, 0.0]])]
    assert sum_with_elected_sign(parts, [1, 1, 1], normalise=True).tolist() == [[2.0, 5.0, -2.0]]
    assert sum_with_elected_sign(parts, [1, 1, 1], normalise=False).tolist() == [[2.0, 5.0, -4.0]]


def test_scale_multiplies_the_merge() -> None:
    one, three = (merged(a_step("ties", {"scale": scale}), models(3), WEIGHTS)["weight"] for scale in (1, 3))
    torch.testing.assert_close(three, 3 * one)


def draws(name: str, settings: dict[str, float], delta: Tensor, count: int) -> Tensor:
    """Merges of one model under so many seeds [count, ...]."""
    return torch.stack([merged(a_step(name, {**settings, "seed": seed}), [{"w": delta}])["w"] for seed in range(count)])


@pytest.mark.parametrize(
    ("name", "settings"), [("dare-linear", {"density": 0.2}), ("della-linear", {"density": 0.4, "epsilon": 0.2})]
)
def test_the_mean_over_a_thousand_masks_is_the_task_vector(name: str, settings: dict[str, float]) -> None:
    delta = a_model(1, {"w": (8, 9)})["w"]
    found = draws(name, settings, delta, 1000).double()
    error = found.std(0) / math.sqrt(1000)
    assert bool(((found.mean(0) - delta).abs() <= 4.5 * error + 1e-6).all())


def test_dare_keeps_the_share_and_multiplies_what_it_keeps() -> None:
    delta = torch.ones(200, 200)
    found = merged(a_step("dare-linear", {"density": 0.2}), [{"w": delta}])["w"]
    assert set(found.unique().tolist()) == {0.0, 5.0}
    assert abs(float((found != 0).float().mean()) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / delta.numel())
    plain = merged(a_step("dare-linear", {"density": 0.2, "rescale": False}), [{"w": delta}])["w"]
    assert torch.equal(plain, found / 5)


def test_della_keeps_larger_entries_of_a_row_more_often() -> None:
    delta = torch.arange(1.0, 12).repeat(3, 1) * torch.tensor([[1.0], [-100.0], [1e-3]])
    found = draws("della-linear", {"density": 0.5, "epsilon": 0.3}, delta, 2000)
    rates = (found != 0).float().mean(0)
    wanted = torch.linspace(0.2, 0.8, 11).expand(3, 11)
    assert float((rates - wanted).abs().max()) < 4.5 * math.sqrt(0.25 / 2000)


def test_della_takes_a_tensor_of_one_dimension_as_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_update, "_PIECE", 4)
    found = draws("della-linear", {"density": 0.5, "epsilon": 0.3}, torch.arange(1.0, 12), 1000)
    rates = (found != 0).float().mean(0)
    assert float(rates[0]) < 0.3 < 0.7 < float(rates[-1])


@pytest.mark.parametrize("settings", [{"density": 0.1}, {"density": 0.9}, {"density": 0.5, "epsilon": 0.49999}])
def test_della_refuses_probabilities_outside_zero_to_one(settings: dict[str, float]) -> None:
    if settings["density"] == 0.5:
        a_step("della", settings)
        return
    with pytest.raises(RecipeError, match=r"^merge, della: density - epsilon and density \+ epsilon must both lie"):
        a_step("della", settings)


@pytest.mark.parametrize("name", ["dare-linear", "della"])
def test_models_tensors_seeds_and_rounds_have_masks_of_their_own(name: str) -> None:
    step = a_step(name, {"density": 0.5})
    same = {"a": torch.ones(40, 5), "b": torch.ones(40, 5)}

    def mask(seed: int = 0, draw: int = 0, tensor: str = "a", weights: tuple[float, ...] = (1.0,)) -> Tensor:
        chosen = step.model_copy(update={"seed": seed})
        return merged(chosen, [same] * len(weights), list(weights), draw)[tensor] != 0

    masks = [mask(), mask(seed=1), mask(draw=1), mask(draw=2), mask(tensor="b"), mask(weights=(0.0, 1.0))]
    assert torch.equal(mask(draw=2), masks[3])
    assert all(not torch.equal(one, other) for i, one in enumerate(masks) for other in masks[:i])


def sce_twin(deltas: list[Tensor], share: float) -> Tensor:
    stack = torch.stack(deltas).double().flatten(1)
    chosen = stack.var(0, correction=0).argsort(descending=True)[: math.floor(share * stack.shape[1])]
    masked = torch.zeros_like(stack)
    masked[:, chosen] = stack[:, chosen]
    weight = masked.square().mean(1) / masked.square().mean(1).sum()
    agree = torch.sign(masked) == torch.where(masked.sum(0) >= 0, 1.0, -1.0)
    over = (weight[:, None] * agree).sum(0)
    return ((weight[:, None] * agree * masked).sum(0) / torch.where(over > 0, over, 1.0)).float()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["bias", "weight", "kernel"])
def test_sce_is_the_twin(name: str, share: float) -> None:
    found = merged(a_step("sce", {"select_topk": share}), models(3))[name]
    torch.testing.assert_close(
        found.flatten(), sce_twin([model[name] for model in models(3)], share), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "settings", "passes"),
    [
        ("ties", {"density": 0.2}, 3),
        ("ties", {"density": 0.2, "rescale": True}, 5),
        ("breadcrumbs", {"density": 0.2}, 5),
        ("breadcrumbs", {"density": 0.2, "rescale": True}, 7),
        ("sce", {"select_topk": 0.2}, 5),
    ],
)
@pytest.mark.parametrize("fits", [True, False])
def test_a_tensor_that_fits_the_budget_is_read_once_and_a_larger_one_piece_by_piece(
    name: str, settings: dict[str, float], passes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads are of pieces in order, none larger, by every pass of a selection; the merge is the same."""
    shape, asked = (1000, 900), list[tuple[int, int]]()
    values = a_model(0, {"w": shape})["w"]
    monkeypatch.setattr(
        "fedtune.merging.combine.task_vectors._delta_cache._BUDGET", 2 * 4 * values.numel() - (not fits)
    )
    monkeypatch.setattr("fedtune.merging.combine.task_vectors._magnitude_selection._SHORT", 0)

    def rows(name: str, start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return values[start:stop]

    step = a_step(name, settings)
    other = MergeInput(Held({"w": values.flip(0)}), 1.0)
    found = torch.cat(list(step.combine("w", shape, [MergeInput(rows, 1.0), other])))
    assert asked == (1 if fits else passes) * list(iter_row_chunks(shape))
    monkeypatch.setattr("fedtune.merging.combine.task_vectors._delta_cache._BUDGET", 1 << 40 if not fits else 0)
    assert torch.equal(found, torch.cat(list(step.combine("w", shape, [MergeInput(rows, 1.0), other]))))
