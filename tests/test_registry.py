from pathlib import Path

import pytest
from pydantic import ValidationError

import fedtune
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, describe_unit_settings, list_unit_names, read_unit_card

PACKAGES = ("fedtune.techniques", "fedtune.merging")
UNITS = [(package, name) for package in PACKAGES for name in list_unit_names(package)]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_names_are_the_public_files(package: str) -> None:
    folder = Path(fedtune.__file__).parent / package.removeprefix("fedtune.")
    files = sorted(path.stem.replace("_", "-") for path in folder.glob("[!_]*.py"))
    assert list_unit_names(package) == files
    assert files


def test_the_first_techniques_and_the_first_merge_are_published() -> None:
    assert {"full", "head-only", "lora", "qlora", "bias", "gradient-checkpointing"} <= set(
        list_unit_names("fedtune.techniques")
    )
    assert "mean" in list_unit_names("fedtune.merging")


@pytest.mark.parametrize(("package", "name"), UNITS)
def test_a_unit_carries_the_name_of_its_file(package: str, name: str) -> None:
    assert build_unit(package, Unit(name=name), "here").name == name


@pytest.mark.parametrize(("package", "name"), UNITS)
def test_a_card_has_every_heading_once_and_in_order(package: str, name: str) -> None:
    lines = read_unit_card(package, name).splitlines()
    cost = "Saves" if package == "fedtune.techniques" else "Memory"
    places = [
        [number for number, line in enumerate(lines) if line.startswith(f"{heading}:")]
        for heading in ("What", cost, "Use when", "Avoid when", "Source")
    ]
    assert all(len(found) == 1 for found in places), places
    assert places == sorted(places)
    assert places[0][0] > 0


@pytest.mark.parametrize(("package", "name"), UNITS)
def test_settings_are_one_line_each_with_a_default(package: str, name: str) -> None:
    fields = type(build_unit(package, Unit(name=name), "here")).model_fields
    lines = describe_unit_settings(package, name)
    assert [line.split(":")[0] for line in lines] == list(fields)
    assert all(" = " in line and "\n" not in line and "Undefined" not in line for line in lines)


def test_a_settings_line_shows_type_default_and_meaning() -> None:
    lines = describe_unit_settings("fedtune.techniques", "lora")
    assert "rank: int = 8" in lines
    assert "alpha: float = 16.0   the product is scaled by alpha / rank" in lines


@pytest.mark.parametrize(("package", "name"), UNITS)
def test_a_unit_refuses_a_key_it_does_not_know(package: str, name: str) -> None:
    with pytest.raises(RecipeError, match=f"^here, {name}: unknown key 'colour'; "):
        build_unit(package, Unit(name=name, settings={"colour": 1}), "here")


@pytest.mark.parametrize(("package", "name"), UNITS)
def test_a_unit_is_frozen(package: str, name: str) -> None:
    unit = build_unit(package, Unit(name=name), "here")
    for field in [*type(unit).model_fields, "colour"]:
        with pytest.raises(ValidationError):
            setattr(unit, field, 1)


@pytest.mark.parametrize("call", [read_unit_card, describe_unit_settings])
def test_a_name_that_is_not_published_is_refused_with_the_nearest(call: object) -> None:
    assert callable(call)
    with pytest.raises(RecipeError, match=r"^techniques: there is no 'lor'; did you mean 'lora'\?"):
        call("fedtune.techniques", "lor")
    with pytest.raises(RecipeError, match=r"there is no '_low-rank'"):
        call("fedtune.techniques", "_low-rank")
    with pytest.raises(RecipeError, match=r"there is no 'xyz'; allowed: activation-pruning, batch-norm, "):
        call("fedtune.techniques", "xyz")
