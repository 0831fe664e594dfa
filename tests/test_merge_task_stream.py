"""Merges for models that arrive one after the other: MagMax, OPCM and LoRM against slow twins and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.merging import MergeContext, MergeInput, bind_combine
from fedtune.merging.combine._subspace_cleaning import clean_delta
from fedtune.merging.combine.lorm import Lorm
from fedtune.merging.combine.task_vectors.magmax import keep_larger
from fedtune.wire.client_update import LowRankPair
from tests.merge_examples import Held, a_step, merged, models, settled_and_merged

MATRICES = ("first.weight", "second.weight")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_magmax_takes_the_larger_change_of_each_entry_and_halves_it() -> None:
    deltas = [{"w": torch.tensor([1.0, -5.0, 0.0])}, {"w": torch.tensor([-2.0, 4.0, 0.0])}]
    assert merged(a_step("magmax", {}), deltas)["w"].tolist() == [-1.0, -2.5, 0.0]


def test_magmax_gives_a_tie_to_the_later_model() -> None:
    forth = [{"w": torch.tensor([1.0, -3.0])}, {"w": torch.tensor([-1.0, 3.0])}]
    step = a_step("magmax", {"scale": 1.0})
    assert merged(step, forth)["w"].tolist() == [-1.0, 3.0]
    assert merged(step, forth[::-1])["w"].tolist() == [1.0, -3.0]


def test_magmax_is_the_argmax_over_all_models() -> None:
    stack = torch.stack([model["weight"] for model in models(5)])
    wanted = stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]
    assert torch.equal(merged(a_step("magmax", {"scale": 1.0}), models(5))["weight"], wanted)


def test_a_running_magmax_needs_no_list_of_models() -> None:
    stack = [(model["weight"] * 3).round() for model in models(6)]  # rounded, so that there are ties
    running = stack[0]
    for later in stack[1:]:
        running = keep_larger(running, later)
    batch = merged(a_step("magmax", {"scale": 1.0}), [{"w": one} for one in stack])["w"]
    assert torch.equal(batch, running)


def clean_slowly(total: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """The authors' rule with full bases, entry by entry."""
    u, s, vh = torch.linalg.svd(total.double(), full_matrices=True)
    place = next(k for k in range(len(s)) if float(s[: k + 1].sum() / s.sum()) > alpha)
    found = torch.zeros_like(total, dtype=torch.float64)
    for i in range(u.shape[1]):
        for j in range(vh.shape[0]):
            if i != j and not (i < place and j < place):
                found += float(u[:, i] @ delta.double() @ vh[j]) * torch.outer(u[:, i], vh[j])
    return found


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 0.999])
def test_a_delta_is_cleaned_as_by_the_slow_rule(shape: tuple[int, int], alpha: float) -> None:
    total, delta = drawn(1, *shape), drawn(2, *shape)
    torch.testing.assert_close(clean_delta(total.double(), delta.double(), alpha), clean_slowly(total, delta, alpha))


def merge_as_the_authors(deltas: list[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """With lambda_t, and the whole model scaled after each task."""

    def norm(model: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in model.values()))

    running, before, norms = dict(deltas[0]), 1.0, [norm(deltas[0])]
    for delta in deltas[1:]:
        norms.append(norm(delta))
        for name, tensor in delta.items():
            new = clean_slowly(running[name], tensor, alpha) if name in MATRICES else tensor.double()
            running[name] = before * running[name].double() + new
        mean, whole = sum(norms) / len(norms), norm(running)
        before = whole / mean
        running = {name: tensor * (mean / whole) for name, tensor in running.items()}
    return running


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_opcm_is_the_published_recursion(alpha: float) -> None:
    shapes = {"first.weight": (7, 5), "second.weight": (4, 6), "bias": (9,), "embed.weight": (8, 3)}
    deltas = [
        {name: drawn(10 * k + place, *shape) for place, (name, shape) in enumerate(shapes.items())} for k in range(4)
    ]
    wanted = merge_as_the_authors(deltas, alpha)
    for name, found in merged(a_step("opcm", {"alpha": alpha}), deltas).items():
        torch.testing.assert_close(found, wanted[name].float(), rtol=1e-5, atol=1e-5)


def test_opcm_keeps_the_mean_norm_and_later_models_leave_the_directions_of_earlier_ones() -> None:
    first, later = torch.diag(torch.tensor([4.0, 3.0, 0.0])), torch.ones(3, 3)
    found = merged(a_step("opcm", {"alpha": 0.9}), [{"w": first}, {"w": later}])["w"]
    assert float(found.norm()) == pytest.approx((5.0 + 3.0) / 2, rel=1e-6)
    factor = float(found[0, 0]) / 4.0  # the diagonal is what the first model made it
    torch.testing.assert_close(found / factor - first, torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 1]]))


def test_opcm_depends_on_the_order_and_magmax_does_not() -> None:
    forth, back = models(3), models(3)[::-1]
    assert not torch.allclose(merged(a_step("opcm", {}), forth)["weight"], merged(a_step("opcm", {}), back)["weight"])
    assert torch.equal(merged(a_step("magmax", {}), forth)["weight"], merged(a_step("magmax", {}), back)["weight"])


def test_opcm_adds_nothing_that_an_equal_model_brings() -> None:
    one = {"w": drawn(3, 6, 4)}
    torch.testing.assert_close(merged(a_step("opcm", {}), [one, one, one])["w"], one["w"])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (0, 3), (3, 0), (), (4, 3, 2)])
@pytest.mark.parametrize("name", ["magmax", "opcm"])
def test_odd_shapes_keep_their_shape(shape: tuple[int, ...], name: str) -> None:
    found = merged(a_step(name, {}), [{"w": drawn(seed, *shape)} for seed in (1, 2, 3)])["w"]
    assert found.shape == shape
    assert bool(found.isfinite().all())


def test_opcm_names_a_model_that_is_not_finite() -> None:
    deltas = [{"w": drawn(1, 4, 3)}, {"w": drawn(2, 4, 3).fill_(math.nan)}]
    with pytest.raises(ClientUpdateError, match=r"^merge: opcm: w of model 2 is not finite; leave this model out$"):
        merged(a_step("opcm", {}), deltas)


RANK, WIDE, TALL = 3, 8, 6


def fit(factors: list[Tensor], grams: list[Tensor], **settings: float) -> Tensor:
    given = [MergeInput(Held({"f": one}), 1.0, {}, Held({"f": gram})) for one, gram in zip(factors, grams, strict=True)]
    return settled_and_merged(Lorm(**settings), given, {"f": tuple(factors[0].shape)})["f"]


def outputs(x: Tensor, *factors: Tensor) -> Tensor:
    """x A^T B^T."""
    for factor in factors:
        x = x @ factor.T
    return x


def solve(design: Tensor, wanted: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(design, wanted).solution
    return solution


def test_lorm_of_a_is_the_least_squares_fit_of_the_layers_outputs() -> None:
    b, x = drawn(1, TALL, RANK), [drawn(seed, 40, WIDE) * (seed + 1) for seed in (2, 3)]
    a = [drawn(seed, RANK, WIDE) for seed in (4, 5)]
    found = fit(a, [one.T @ one for one in x])
    targets = torch.cat([outputs(one, factor, b) for one, factor in zip(x, a, strict=True)])
    best = solve(torch.cat(x), targets)  # of all products, also of those that are no B A
    torch.testing.assert_close((b @ found).T, best, rtol=1e-3, atol=1e-3)


def test_lorm_of_b_is_the_least_squares_fit_of_the_layers_outputs() -> None:
    a, x = drawn(1, RANK, WIDE), [drawn(seed, 40, WIDE) * (seed + 1) for seed in (2, 3)]
    b = [drawn(seed, TALL, RANK) for seed in (4, 5)]
    found = fit(b, [a @ one.T @ one @ a.T for one in x])
    targets = torch.cat([outputs(one, a, factor) for one, factor in zip(x, b, strict=True)])
    torch.testing.assert_close(found.T, solve(torch.cat(x) @ a.T, targets), rtol=1e-3, atol=1e-3)


def test_lorm_keeps_the_start_in_directions_that_no_input_has() -> None:
    x = [drawn(seed, 40, WIDE) for seed in (2, 3)]
    for one in x:
        one[:, 5:] = 0
    a = [drawn(seed, RANK, WIDE) for seed in (4, 5)]
    found = fit(a, [one.T @ one for one in x])
    assert bool((found[:, 5:] == 0).all())
    torch.testing.assert_close(
        found[:, :5], fit([one[:, :5] for one in a], [one[:, :5].T @ one[:, :5] for one in x]), rtol=1e-4, atol=1e-4
    )


def test_lorm_refuses_pairs_of_which_both_factors_came() -> None:
    given = [MergeInput(Held({}), 0.5, {}, Held({"a": torch.eye(2)}))]
    context = MergeContext(low_rank_pairs=[LowRankPair("b", "a", 1.0)])
    with pytest.raises(RecipeError, match=r"^merge: lorm fits one factor while all .* both b and a came; set lora:"):
        bind_combine(Lorm(), {"a": (2, 2), "b": (2, 2)}, given, context)
