import itertools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fedtune.merging.align.rebasin._activation_matching import (
    ActivationComparison,
    compute_similarities,
    match_activations,
)
from fedtune.merging.align.rebasin._assignment import compute_total_gain, solve_assignment
from fedtune.merging.align.rebasin._permutations import (
    HeadLayout,
    PermutationKind,
    Permutations,
    PermutationSpec,
    UnitLayout,
)
from fedtune.merging.align.rebasin._weight_matching import (
    compute_agreement,
    compute_gain_matrices,
    match_weights,
    run_coordinate_ascent,
)
from tests.rebasin_models import (
    NETS,
    TEXT,
    arrangement,
    batch_for,
    convolutional,
    drawn,
    inverse,
    lively,
    mlp,
    read,
    shuffled,
    symmetry_of,
)

State = dict[str, Tensor]
KINDS: dict[str, PermutationKind] = {
    "units": UnitLayout(5),
    "units in groups": UnitLayout(6, 3),
    "heads": HeadLayout(3, 1, 2, 3, is_rotary=False),
    "grouped heads": HeadLayout(2, 2, 2, 3, is_rotary=True),
}


def shuffled_copy(
    model: nn.Module, noise: float = 0.0, seed: int = 0
) -> tuple[PermutationSpec, State, State, Permutations]:
    """The symmetry, a model, its units shuffled under noise (in deviations of each tensor), and what undoes that."""
    symmetry = symmetry_of(model)
    state, orders = {name: tensor.clone() for name, tensor in model.state_dict().items()}, shuffled(symmetry, seed)
    random = torch.Generator().manual_seed(seed + 100)
    other = {}
    for name, tensor in state.items():
        moved = symmetry.permute(name, tensor, orders)
        spread = moved.std() if tensor.is_floating_point() and tensor.numel() > 1 else 0.0
        other[name] = moved + noise * spread * torch.randn(tensor.shape, generator=random) if noise else moved
    return symmetry, state, other, inverse(orders)


def same(one: Permutations, other: Permutations) -> bool:
    return all(torch.equal(one[name][part], at) for name, parts in other.items() for part, at in parts.items())


def weights(symmetry: PermutationSpec, state: State, other: State, visits: int = 1) -> Permutations:
    start = symmetry.build_identity()
    return match_weights(symmetry, read(state), read(other), start, visits=visits, sweeps=100)[0]


def wide_mlp() -> nn.Module:
    return drawn(mlp(100, 256, 256, 256, 10))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 1.0])
def test_a_known_permutation_is_recovered_exactly_under_noise(noise: float) -> None:
    symmetry, state, other, undone = shuffled_copy(wide_mlp(), noise)
    assert same(weights(symmetry, state, other), undone)


@pytest.mark.parametrize(
    "name", ["convolutional, norm batch", "convolutional, norm group", "residual", "resnet18", "bert", "gpt2", "llama"]
)
def test_known_permutations_of_all_layers_and_heads_are_recovered(name: str) -> None:
    symmetry, state, other, undone = shuffled_copy(drawn({**NETS, **TEXT}[name]()), 0.05)
    best, before, after = match_weights(
        symmetry, read(state), read(other), symmetry.build_identity(), visits=5, sweeps=100
    )
    assert after > before
    assert after == pytest.approx(compute_agreement(symmetry, read(state), read(other), undone), rel=1e-9)
    assert same(best, undone)


def test_the_inverse_of_the_order_found_is_not_an_answer() -> None:
    symmetry, state, other, undone = shuffled_copy(wide_mlp())
    wrong = compute_agreement(symmetry, read(state), read(other), inverse(undone))
    assert wrong < 0.5 * compute_agreement(symmetry, read(state), read(other), undone)


@pytest.mark.parametrize("name", ["convolutional, norm batch", "resnet18", "bert", "gpt2", "llama"])
def test_agreement_falls_in_no_update(name: str) -> None:
    one, two = (drawn({**NETS, **TEXT}[name](), seed).state_dict() for seed in (1, 2))
    symmetry = symmetry_of({**NETS, **TEXT}[name]())
    start, random = symmetry.build_identity(), torch.Generator().manual_seed(0)
    reached = [compute_agreement(symmetry, read(one), read(two), start)]
    for orders in run_coordinate_ascent(symmetry, read(one), read(two), start, random, 100):
        reached.append(compute_agreement(symmetry, read(one), read(two), orders))
        assert reached[-1] >= reached[-2] - 1e-9 * abs(reached[-2])
    assert len(reached) > 2
    assert reached[-1] > reached[0]


def test_agreement_is_the_distance_in_other_words() -> None:
    one, two = (drawn(mlp(), seed).state_dict() for seed in (1, 2))
    symmetry = symmetry_of(mlp())

    def square(orders: Permutations) -> float:
        moved = {name: symmetry.permute(name, two[name], orders) for name in symmetry.list_permuted_tensors()}
        return float(sum((one[name] - tensor).double().square().sum() for name, tensor in moved.items()))

    still, other = symmetry.build_identity(), shuffled(symmetry)
    gained = [compute_agreement(symmetry, read(one), read(two), orders) for orders in (still, other)]
    assert square(still) - square(other) == pytest.approx(2 * (gained[1] - gained[0]), rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "convolutional, norm batch", "residual", "bert", "llama"])
def test_a_model_matched_to_itself_stays(name: str) -> None:
    model = drawn({**NETS, **TEXT}[name]())
    symmetry, state = symmetry_of(model), model.state_dict()
    assert same(weights(symmetry, state, state, visits=3), symmetry.build_identity())


def test_one_hidden_layer_takes_one_update() -> None:
    symmetry = symmetry_of(mlp(12, 16, 5))
    one, two = (drawn(mlp(12, 16, 5), seed).state_dict() for seed in (1, 2))
    random = torch.Generator().manual_seed(0)
    assert len(list(run_coordinate_ascent(symmetry, read(one), read(two), symmetry.build_identity(), random, 100))) == 1


def test_more_orders_of_layers_find_no_worse_a_match() -> None:
    symmetry = symmetry_of(mlp())
    one, two = (read(drawn(mlp(), seed).state_dict()) for seed in (1, 2))
    start = symmetry.build_identity()
    found = [match_weights(symmetry, one, two, start, visits=visits, sweeps=100)[2] for visits in (1, 2, 8)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_running_statistics_have_no_say_but_move_along() -> None:
    symmetry, state, other, undone = shuffled_copy(drawn(convolutional("batch")))
    loud = {name: 1e6 * torch.rand(t.shape) if "running" in name else t for name, t in other.items()}
    assert same(weights(symmetry, state, loud, visits=5), undone)
    found = symmetry.permute("1.running_var", other["1.running_var"], undone)
    assert torch.equal(found, state["1.running_var"])


def test_gains_are_what_an_update_gains() -> None:
    symmetry = symmetry_of(mlp())
    one, two = (read(drawn(mlp(), seed).state_dict()) for seed in (1, 2))
    orders = shuffled(symmetry)
    gain = compute_gain_matrices(symmetry, "2", one, two, orders)
    other = {**orders, "2": arrangement(symmetry.kinds["2"], torch.Generator().manual_seed(9))}
    difference = compute_agreement(symmetry, one, two, other) - compute_agreement(symmetry, one, two, orders)
    assert compute_total_gain(other["2"], gain) - compute_total_gain(orders["2"], gain) == pytest.approx(
        difference, rel=1e-9
    )


def every_order(kind: PermutationKind) -> list[Any]:
    """All orders that a kind allows: the twin of the assignments."""

    def shuffles(size: int) -> list[Tensor]:
        return [torch.tensor(order) for order in itertools.permutations(range(size))]

    if isinstance(kind, UnitLayout):
        width = kind.size // kind.groups
        inner = itertools.product(shuffles(width), repeat=kind.groups)
        chosen = itertools.product(shuffles(kind.groups), inner)
        return [{"": (torch.stack(of) + outer[:, None] * width).flatten()} for outer, of in chosen]
    still = [torch.arange(kind.qk)]
    p, qk, v = (
        [torch.stack(of) for of in itertools.product(orders, repeat=kind.num_kv_heads)]
        for orders in (
            shuffles(kind.queries_per_kv_head),
            still if kind.is_rotary else shuffles(kind.qk),
            shuffles(kind.v),
        )
    )
    return [kind.build_permutation(*chosen) for chosen in itertools.product(shuffles(kind.num_kv_heads), p, qk, v)]


@pytest.mark.parametrize("name", KINDS)
def test_assignments_find_the_best_of_all_orders(name: str) -> None:
    kind, random = KINDS[name], torch.Generator().manual_seed(5)
    for _ in range(2):
        gain = {part: torch.randn(n, n, generator=random, dtype=torch.float64) for part, n in kind.parts.items()}
        best = max(compute_total_gain(order, gain) for order in every_order(kind))
        found = compute_total_gain(solve_assignment(kind, gain), gain)
        exact = not isinstance(kind, HeadLayout) or kind.queries_per_kv_head == 1
        assert found == pytest.approx(best, rel=1e-12) if exact else 0.8 * best < found <= best + 1e-9


def by_activity(
    model: nn.Module, state: State, other: State, similarity: Literal["pearson", "inner"] = "pearson"
) -> Permutations:
    symmetry = symmetry_of(model)
    comparison = ActivationComparison(model.eval(), [batch_for(model, 64)], similarity)
    return match_activations(symmetry, read(state), read(other), symmetry.build_identity(), comparison)[0]


@pytest.mark.parametrize("similarity", ["pearson", "inner"])
@pytest.mark.parametrize("name", ["convolutional, norm layer", "resnet18", "bert", "llama"])
def test_activations_recover_known_permutations(name: str, similarity: Literal["pearson", "inner"]) -> None:
    model = lively(drawn({**NETS, **TEXT}[name]()))
    symmetry, state, other, undone = shuffled_copy(model)
    found = by_activity(model, state, other, similarity)
    comparison = ActivationComparison(model, [batch_for(model, 64)], similarity)
    seen = compute_similarities(symmetry, read(state), read(other), comparison)
    for permutation, gain in seen.items():
        assert compute_total_gain(found[permutation], gain) >= (1 - 1e-6) * compute_total_gain(
            undone[permutation], gain
        )
    if similarity == "pearson":
        assert same(found, undone)


def test_correlations_are_those_of_numpy_over_all_batches() -> None:
    model = drawn(mlp(12, 7, 5))
    one, two = (drawn(mlp(12, 7, 5), seed).state_dict() for seed in (1, 2))
    batches = [{"input": torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows))} for rows in (30, 11)]
    comparison = ActivationComparison(model, batches, "pearson")
    found = compute_similarities(symmetry_of(model), read(one), read(two), comparison)["0"][""]
    inputs = torch.cat([batch["input"] for batch in batches])
    active = [torch.relu(inputs @ state["0.weight"].T + state["0.bias"]).double() for state in (one, two)]
    wanted = torch.corrcoef(torch.cat(active, 1).T)[:7, 7:].nan_to_num(0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", [-100.0, 3.0])
def test_units_that_do_not_vary_correlate_with_none(level: float) -> None:
    model = drawn(mlp(12, 7, 5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["0.weight"][2], state["0.bias"][2] = 0.0, level
    comparison = ActivationComparison(model, [batch_for(model, 64)], "pearson")
    found = compute_similarities(symmetry_of(model), read(state), read(state), comparison)["0"][""]
    assert bool(found.isfinite().all())
    assert float(found[2].abs().max()) == 0.0
    assert torch.equal(found.argmax(1)[[0, 1, 3]], torch.tensor([0, 1, 3]))


def test_activities_are_seen_after_the_nonlinearity() -> None:
    """Units that differ only where the nonlinearity cuts them correlate fully before it, and less behind it."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    model.load_state_dict(
        {
            "0.weight": torch.ones(2, 1),
            "0.bias": torch.tensor([5.0, -1.0]),
            "2.weight": torch.ones(1, 2),
            "2.bias": torch.ones(1),
        }
    )
    batches = [{"input": torch.linspace(-2, 2, 50)[:, None]}]
    reader = read(model.state_dict())
    seen = compute_similarities(symmetry_of(model), reader, reader, ActivationComparison(model, batches, "pearson"))
    assert 0.1 < float(seen["0"][""][0, 1]) < 0.95
