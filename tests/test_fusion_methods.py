from typing import Any

import pytest

from fedtune.fusion.methods import method


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
    assert method("nuslerp").step([said], "weight", 0.0).model_dump()["over"] == over


@pytest.mark.parametrize(("said", "over"), [({}, "tensor"), ({"filter_wise": True}, "row")])
def test_model_stock_takes_rows_when_filter_wise(said: dict[str, Any], over: str) -> None:
    assert method("model_stock").step([said], "weight", 0.0).model_dump()["over"] == over


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties"])
def test_a_schema_that_names_no_density_keeps_everything(name: str) -> None:
    assert method(name).step([], "weight", 0.0).model_dump()["density"] == 1.0
    assert method(name).step([{"density": 0.3}], "weight", 0.0).model_dump()["density"] == 0.3
