"""Merges of low-rank pairs in a round: the equations, beside dense twins."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import MergeContext, build_pipeline, measure_averaging_errors, merge_client_updates
from fedtune.recipe.schema import Unit
from fedtune.wire.client_update import ClientUpdate, LowRankPair
from tests.test_merging import spool

D, K, R, SCALE = 12, 9, 3, 2.0
PAIR = LowRankPair("fc.lora_B", "fc.lora_A", SCALE, "fc.weight")
NAMES = ["fc.lora_A", "fc.lora_B", "head"]
EXAMPLES = [3, 10, 17]
WEIGHTS = [one / sum(EXAMPLES) for one in EXAMPLES]
ALL = ["fedit", "flexlora", "hetlora", "fedex-lora", "flora"]
EXACT = ["fedex-lora", "flora"]
State = Mapping[str, Tensor]


def drawn(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"fc.lora_A": (R, K), "fc.lora_B": (D, R), "fc.weight": (D, K), "head": (5,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def sent(folder: Path, deltas: Sequence[State], examples: Sequence[int] = EXAMPLES) -> list[ClientUpdate]:
    named = [{name: delta[name] for name in NAMES} for delta in deltas]
    return [spool(folder, k, n, delta) for k, (n, delta) in enumerate(zip(examples, named, strict=True))]


def merged(
    step: str, contributions: Sequence[ClientUpdate], pair: LowRankPair = PAIR, draw: int = 1
) -> dict[str, Tensor]:
    evidence = MergeContext(low_rank_pairs=[pair], round_number=draw)
    return merge_client_updates(build_pipeline([Unit(name=step)]), drawn(0), NAMES, contributions, evidence)


def product(state: State) -> Tensor:
    return SCALE * state["fc.lora_B"].double() @ state["fc.lora_A"].double()


def whole(state: State) -> Tensor:
    return state["fc.weight"].double() + product(state)


def own(delta: State) -> dict[str, Tensor]:
    return {name: tensor + delta[name] if name in NAMES else tensor for name, tensor in drawn(0).items()}


def wanted(deltas: Sequence[State]) -> Tensor:
    """The mean of the clients' whole weights, dense: what federated averaging of merged clients would give."""
    return torch.stack([w * whole(own(delta)) for w, delta in zip(WEIGHTS, deltas, strict=True)]).sum(0)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


DELTAS = [drawn(seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("step", EXACT)
def test_base_and_pair_together_are_the_mean_of_the_clients_whole_weights(tmp_path: Path, step: str) -> None:
    assert relative(whole(merged(step, sent(tmp_path, DELTAS))), wanted(DELTAS)) < 1e-6


@pytest.mark.parametrize("step", ALL)
def test_a_head_beside_the_pairs_gets_its_weighted_mean(tmp_path: Path, step: str) -> None:
    mean = drawn(0)["head"] + sum(w * delta["head"] for w, delta in zip(WEIGHTS, DELTAS, strict=True))
    torch.testing.assert_close(merged(step, sent(tmp_path, DELTAS))["head"], mean)


@pytest.mark.parametrize("step", ALL)
def test_one_client_alone_is_followed(tmp_path: Path, step: str) -> None:
    after = merged(step, sent(tmp_path, DELTAS[:1], [7]))
    assert relative(whole(after), whole(own(DELTAS[0]))) < 1e-6


@pytest.mark.parametrize("step", ALL)
def test_equal_clients_are_followed(tmp_path: Path, step: str) -> None:
    after = merged(step, sent(tmp_path, [DELTAS[0]] * 3))
    assert relative(whole(after), whole(own(DELTAS[0]))) < 1e-6


@pytest.mark.parametrize("step", ALL)
def test_the_bits_do_not_depend_on_who_answers_first(tmp_path: Path, step: str) -> None:
    contributions = sent(tmp_path, DELTAS)
    one, other = merged(step, contributions), merged(step, contributions[::-1])
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", ["fedit", "flexlora", "hetlora"])
def test_the_base_stays_where_a_step_does_not_write_it(tmp_path: Path, step: str) -> None:
    after = merged(step, sent(tmp_path, DELTAS))
    assert torch.equal(after["fc.weight"], drawn(0)["fc.weight"])


def test_fedit_is_the_mean_of_each_factor(tmp_path: Path) -> None:
    contributions = sent(tmp_path, DELTAS)
    apart = merge_client_updates(build_pipeline([Unit(name="mean")]), drawn(0), NAMES, contributions)
    after = merged("fedit", contributions)
    for name in NAMES:
        torch.testing.assert_close(after[name], apart[name])


def test_flexlora_is_the_best_of_its_rank(tmp_path: Path) -> None:
    mean = wanted(DELTAS) - drawn(0)["fc.weight"]
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    after = merged("flexlora", sent(tmp_path, DELTAS))
    assert relative(product(after), u[:, :R] * s[:R] @ vh[:R]) < 1e-6
    assert after["fc.lora_A"].shape == (R, K)


def test_flexlora_pads_a_rank_that_the_layer_cannot_fill(tmp_path: Path) -> None:
    wide = {"B": torch.randn(2, 5), "A": torch.randn(5, 7)}
    delta = spool(tmp_path, 0, 1, {name: torch.zeros_like(tensor) for name, tensor in wide.items()})
    after = merge_client_updates(
        build_pipeline([Unit(name="flexlora")]),
        wide,
        ["A", "B"],
        [delta],
        MergeContext(low_rank_pairs=[LowRankPair("B", "A", 1.0)]),
    )
    assert after["B"].shape == (2, 5)
    torch.testing.assert_close(after["B"] @ after["A"], wide["B"] @ wide["A"])


def test_hetlora_weighs_by_the_norms_of_the_products(tmp_path: Path) -> None:
    norms = [float(product(own(delta)).norm()) for delta in DELTAS]
    after = merged("hetlora", sent(tmp_path, DELTAS))
    for name in ("fc.lora_A", "fc.lora_B"):
        mean = torch.stack([n / sum(norms) * own(delta)[name] for n, delta in zip(norms, DELTAS, strict=True)]).sum(0)
        torch.testing.assert_close(after[name], mean)


def test_flora_begins_again_and_draws_anew_each_round(tmp_path: Path) -> None:
    contributions = sent(tmp_path, DELTAS)
    first, again, second = (merged("flora", contributions, draw=draw) for draw in (1, 1, 2))
    assert not first["fc.lora_B"].any()
    assert torch.equal(first["fc.lora_A"], again["fc.lora_A"])
    assert not torch.equal(first["fc.lora_A"], second["fc.lora_A"])
    assert float(first["fc.lora_A"].abs().max()) <= 1 / K**0.5


@pytest.mark.parametrize("step", EXACT)
def test_a_transposed_weight_gets_the_transpose(tmp_path: Path, step: str) -> None:
    contributions = sent(tmp_path, DELTAS)
    state = {**drawn(0), "fc.weight": drawn(0)["fc.weight"].T.contiguous()}
    evidence = MergeContext(low_rank_pairs=[PAIR._replace(transposed=True)])
    after = merge_client_updates(build_pipeline([Unit(name=step)]), state, NAMES, contributions, evidence)
    assert relative(after["fc.weight"].T + product(after), wanted(DELTAS)) < 1e-6


@pytest.mark.parametrize("step", EXACT)
def test_a_base_that_is_not_shared_is_named(tmp_path: Path, step: str) -> None:
    with pytest.raises(RecipeError, match=r"^merge: the weight beside fc.lora_B is not shared; set lora: "):
        merged(step, sent(tmp_path, DELTAS), PAIR._replace(base=None))


def figures(step: str, contributions: Sequence[ClientUpdate]) -> dict[str, float]:
    return measure_averaging_errors(
        build_pipeline([Unit(name=step)]), drawn(0), NAMES, contributions, MergeContext(low_rank_pairs=[PAIR])
    )


def test_the_errors_of_a_round_are_those_of_the_dense_products(tmp_path: Path) -> None:
    contributions = sent(tmp_path, DELTAS)
    mean = wanted(DELTAS) - drawn(0)["fc.weight"]
    fedit, flexlora = (product(merged(step, contributions)) for step in ("fedit", "flexlora"))
    found = figures("flexlora", contributions)
    assert found == {
        "factor_error": pytest.approx(relative(fedit, mean), rel=1e-5),
        "rank_error": pytest.approx(relative(flexlora, mean), rel=1e-5),
    }
    assert all(figures(step, contributions).keys() == {"factor_error"} for step in ALL if step != "flexlora")
    assert figures("mean", contributions) == {}


@pytest.mark.parametrize("step", ALL)
def test_a_round_whose_products_cancel_is_merged_and_its_error_has_no_figure(tmp_path: Path, step: str) -> None:
    one = {name: (4 * tensor).round() for name, tensor in DELTAS[0].items()}  # so that sums are exact
    other = {**one, "fc.lora_B": -2 * one["fc.lora_B"], "fc.lora_A": one["fc.lora_A"] / 2}
    zero = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    contributions, evidence = sent(tmp_path, [one, other], [1, 1]), MergeContext(low_rank_pairs=[PAIR])
    assert "factor_error" not in measure_averaging_errors(
        build_pipeline([Unit(name=step)]), zero, NAMES, contributions, evidence
    )
    after = merge_client_updates(build_pipeline([Unit(name=step)]), zero, NAMES, contributions, evidence)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())


def test_the_error_of_a_round_with_a_common_factor_is_zero_to_the_bit(tmp_path: Path) -> None:
    deltas = [{**delta, "fc.lora_A": torch.zeros(R, K)} for delta in DELTAS]
    assert figures("fedit", sent(tmp_path, deltas)) == {"factor_error": 0.0}


@pytest.mark.parametrize("step", ALL)
def test_no_relax_step_follows_new_factors(step: str) -> None:
    with pytest.raises(
        RecipeError, match=f"^merge: {step} makes new factors, which no relax step can scale; drop one$"
    ):
        build_pipeline([Unit(name=step), Unit(name="shrink", settings={"factor": 0.5})])
    assert pickle.loads(pickle.dumps(build_pipeline([Unit(name=step)]))) == build_pipeline([Unit(name=step)])
