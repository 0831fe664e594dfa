"""Every continual method passes the checks that a plug-in's author would run."""

import pytest

from fedtune.library.continual_check import check_continual_method
from fedtune.recipe.unit_registry import list_unit_names

NAMES = list_unit_names("fedtune.continual")


@pytest.mark.parametrize("name", NAMES)
def test_every_method_passes_the_checks_of_a_plug_in(name: str) -> None:
    results = list(check_continual_method(name))
    assert {(one.status, one.what, one.reason) for one in results if one.status == "failed"} == set()
    assert sum(one.status == "ok" for one in results) >= 3, results
