"""The identities every merge of several models must have, by one table of settings."""

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import CombineStep, MergeContext, bind_combine
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, list_unit_names
from fedtune.wire import client_update
from tests.merge_examples import (
    METHODS,
    SHAPES,
    a_model,
    a_step,
    merged,
    models,
    operands,
    plain,
    settled_and_merged,
    thinning,
    whole,
)

WEIGHTS = {
    1: [1.0],
    2: [0.7, 0.3],
    3: [0.5, 0.3, 0.2],
    5: [0.3, 0.3, 0.2, 0.1, 0.1],
    7: [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1],
}
EACH = pytest.mark.parametrize("name", METHODS)


def having(identity: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, method in METHODS.items() if getattr(method, identity)])


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance * float(tensor.abs().sum() > 0) * 4)


def test_the_table_has_every_step_that_combines_tensors_one_by_one() -> None:
    steps = {
        name: build_unit("fedtune.merging", Unit(name=name), "merge") for name in list_unit_names("fedtune.merging")
    }
    combining = {
        name for name, step in steps.items() if isinstance(step, CombineStep) and step.update_kind == "tensors"
    }
    assert combining == set(METHODS)


@having("same")
def test_models_that_are_equal_give_that_model(name: str) -> None:
    count = METHODS[name].models
    assert_equal(merged(plain(name), [a_model(1)] * count, WEIGHTS[count]), a_model(1))


@having("alone")
def test_a_model_that_alone_has_weight_is_the_result(name: str) -> None:
    count = METHODS[name].models
    for place in range(count):
        weights = [float(index == place) for index in range(count)]
        assert_equal(merged(plain(name), models(count), weights), a_model(place))


@having("symmetric")
def test_the_order_of_models_does_not_matter(name: str) -> None:
    count = METHODS[name].models
    given = operands(plain(name), models(count), WEIGHTS[count])
    forth, back = settled_and_merged(plain(name), given), settled_and_merged(plain(name), given[::-1])
    assert_equal(back, forth)


@EACH
@pytest.mark.parametrize("piece", [1, 5, 40])
def test_the_bits_do_not_depend_on_the_piece(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = METHODS[name].models
    whole = merged(thinning(name), models(count), WEIGHTS[count])
    monkeypatch.setattr(client_update, "_PIECE", piece)
    pieces = merged(thinning(name), models(count), WEIGHTS[count])
    assert all(torch.equal(whole[tensor], pieces[tensor]) for tensor in whole)


@EACH
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    shapes = {"wide": (3, 90_000), "long": (80_000,)}
    count, before = METHODS[name].models, torch.get_num_threads()
    given = [a_model(seed, shapes) for seed in range(count)]
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(merged_without_statistics(name, given, count))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][tensor], found[1][tensor]) for tensor in shapes)


def merged_without_statistics(name: str, given: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """No Gram matrix is measured of layers as wide as these, so the mean is what is left."""
    return merged(thinning("linear" if name in ("regmean", "lorm") else name), given, WEIGHTS[count])


@EACH
def test_models_are_left_as_they_were(name: str) -> None:
    count = METHODS[name].models
    given = models(count)
    merged(thinning(name), given, WEIGHTS[count])
    for model, before in zip(given, models(count), strict=True):
        assert all(torch.equal(model[tensor], before[tensor]) for tensor in before)


@EACH
def test_a_tensor_that_no_model_changed_stays(name: str) -> None:
    count = METHODS[name].models
    still = {tensor: torch.zeros_like(value) for tensor, value in a_model(0).items()}
    assert all(not bool(value.any()) for value in merged(thinning(name), [still] * count).values())


def test_a_linear_merge_of_shares_is_the_base_and_task_arithmetic() -> None:
    base, weights = a_model(9), [0.5, 0.3, 0.2]
    deltas = [{name: model[name] - base[name] for name in base} for model in models(3)]
    task = merged(plain("task-arithmetic"), deltas, weights)
    assert_equal({name: base[name] + task[name] for name in base}, merged(plain("linear"), models(3), weights))


@pytest.mark.parametrize(
    "name", ["linear", "nuslerp", "multislerp", "karcher", "geometric-median", "fisher", "regmean", "lorm"]
)
def test_weights_that_sum_to_zero_are_refused(name: str) -> None:
    count = METHODS[name].models
    weights = [1.0, -1.0, 0.0][:count]
    with pytest.raises(RecipeError, match=r"^merge: the weights sum to zero, .*; change one of them$"):
        merged(plain(name), models(count), weights)


@pytest.mark.parametrize(("name", "short"), [("ties", "lambda"), ("task-arithmetic", "lambda")])
def test_lambda_and_normalize_are_other_spellings(name: str, short: str) -> None:
    step = a_step(name, {short: 0.5, "normalize": False})
    assert step == a_step(name, {"scale": 0.5, "normalise": False})


def test_knobs_of_a_model_go_before_the_steps_and_are_checked() -> None:
    step = a_step("ties", {"density": 1.0, "normalise": False})
    given = operands(step, [a_model(0)], [1.0]) + operands(step, [a_model(1)], [1.0], {"density": 0.01})
    found = whole(step, "weight", SHAPES["weight"], given)
    assert 1 <= int((found != a_model(0)["weight"]).sum()) <= 3  # floor(0.01 * 322) entries take part
    with pytest.raises(RecipeError, match=r"^merge, ties: density is 2"):
        bind_combine(step, SHAPES, operands(step, models(1), [1.0], {"density": 2.0}), MergeContext())
