from typing import Any

import pytest
import torch

from fedtune.errors import RecipeError
from fedtune.merging import MergeInput
from fedtune.offline_merge.merge_methods import build_merge_method


@pytest.mark.parametrize(
    ("said", "over"),
    [
        ({}, "tensor"),
        ({"nuslerp_flatten": False}, "row"),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, "column"),
        ({"nuslerp_row_wise": True}, "tensor"),
    ],
)
def test_nuslerps_switches_mean_what_they_do_in_mergekit(said: dict[str, Any], over: str) -> None:
    assert build_merge_method("nuslerp").build_step([said], "weight", 0.0).model_dump()["granularity"] == over


@pytest.mark.parametrize(("said", "over"), [({}, "tensor"), ({"filter_wise": True}, "row")])
def test_model_stock_takes_rows_when_filter_wise(said: dict[str, Any], over: str) -> None:
    assert build_merge_method("model_stock").build_step([said], "weight", 0.0).model_dump()["granularity"] == over


THINNING = ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"]


@pytest.mark.parametrize("name", THINNING)
def test_a_schema_that_names_no_density_keeps_everything(name: str) -> None:
    chosen = build_merge_method(name)
    assert chosen.build_step([], "weight", 0.0).model_dump()["density"] == 1.0
    assert chosen.bind_model([{}], "weight", 0.0).overrides == {}
    assert chosen.bind_model([{}, {"density": 0.3}], "weight", 0.0).overrides == {"density": 0.3}


@pytest.mark.parametrize("name", THINNING)
@pytest.mark.parametrize(("density", "nothing"), [(0, True), (0.0, True), (1, False), (0.5, False)])
def test_a_density_of_zero_keeps_nothing(name: str, density: float, nothing: bool) -> None:
    assert build_merge_method(name).bind_model([{"density": density}], "weight", 0.0).nothing == nothing


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("slerp", "t", 0.3),
        ("ties", "lambda", 0.5),
        ("ties", "scale", 0.5),
        ("linear", "normalize", False),
        ("linear", "normalise", False),
        ("sce", "select_topk", 0.5),
        ("karcher", "max_iter", 3),
        ("model_stock", "filter_wise", True),
        ("nuslerp", "nuslerp_flatten", False),
    ],
)
def test_a_setting_of_the_whole_merge_is_none_of_one_model(name: str, key: str, value: object) -> None:
    build_merge_method(name).check_parameters({key: value}, "parameters")
    with pytest.raises(RecipeError, match=f"the parameters of a: {key} of .* is a setting of the whole merge, not of"):
        build_merge_method(name).check_parameters({key: value}, "the parameters of a", own=True)


@pytest.mark.parametrize("key", ["weight", "density", "gamma", "int8_mask"])
def test_what_a_model_may_set_for_itself_is_taken(key: str) -> None:
    build_merge_method("breadcrumbs").check_parameters({key: 0.5}, "the parameters of a", own=True)


def test_rescale_stretches_nothing_where_nothing_is_dropped() -> None:
    build_merge_method("task_arithmetic").check_parameters({"rescale": True}, "parameters")
    assert (
        build_merge_method("task_arithmetic").build_step([{"rescale": True}], "weight", 0.0).model_dump()["scale"]
        == 1.0
    )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescale_is_off_until_it_is_asked_for(name: str, rescale: bool) -> None:
    build_merge_method(name).check_parameters({"rescale": rescale}, "parameters")
    assert not build_merge_method(name).build_step([], "weight", 0.0).model_dump()["rescale"]
    assert build_merge_method(name).bind_model([{"rescale": rescale}], "weight", 0.0).overrides["rescale"] == rescale


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della"])
def test_which_sum_rescale_keeps_is_no_parameter(name: str) -> None:
    with pytest.raises(RecipeError, match=r"parameters: .* has no parameter 'rescale_norm'; did you mean 'rescale'\?$"):
        build_merge_method(name).check_parameters({"rescale_norm": "l2"}, "parameters")


def test_task_arithmetic_drops_nothing_and_says_so() -> None:
    build_merge_method("task_arithmetic").check_parameters({"density": 1}, "parameters")
    with pytest.raises(RecipeError, match=r"parameters: task-arithmetic knows density only as 1\.0; leave it out$"):
        build_merge_method("task_arithmetic").check_parameters({"density": 0.5}, "parameters")


def test_della_without_rescaling_keeps_entries_as_they_are() -> None:
    step = build_merge_method("della_linear").build_step([], "weight", 0.0)
    rows = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    operand = MergeInput(lambda name, start, stop: rows[start:stop], 1.0, {"density": 0.5, "rescale": False})
    found = torch.cat(list(step.combine("weight", (7, 11), [operand])))
    kept = found != 0
    assert 0 < int(kept.sum()) < 77
    assert torch.equal(found[kept], rows[kept])


@pytest.mark.parametrize(
    ("method", "said", "field", "value"),
    [
        ("karcher", {"max_iterations": 3}, "max_iterations", 3),
        ("karcher", {"max_iter": 3}, "max_iterations", 3),
        ("karcher", {"iterations": 3, "tol": 0.5}, "max_iterations", 3),
        ("nuslerp", {"over": "row"}, "granularity", "row"),
        ("mean", {"weighting": "equal"}, "weighting", "equal"),
    ],
)
def test_parameters_go_by_mergekits_names_and_by_ours_of_yesterday_and_today(
    method: str, said: dict[str, Any], field: str, value: object
) -> None:
    chosen = build_merge_method(method)
    chosen.check_parameters(said, "parameters")
    assert chosen.build_step([said], "weight", 0.0).model_dump()[field] == value
