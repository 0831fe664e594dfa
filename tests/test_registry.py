import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import fedtune
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_folders import find_unit_modules
from fedtune.recipe.unit_registry import (
    build_unit,
    describe_unit_settings,
    list_unit_names,
    read_unit_card,
)

PACKAGES = ("fedtune.techniques", "fedtune.merging")
UNITS = [(package, name) for package in PACKAGES for name in list_unit_names(package)]
OTHER_ROOMS = ("fedtune.algorithms", "fedtune.continual")


UNIT = """from typing import ClassVar

from fedtune.recipe.unit_registry import NamedUnit


class Planted(NamedUnit):
    name: ClassVar[str] = "planted"
"""
BROKEN = "raise AssertionError('imported')"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty package with a name of its own, because imported modules stay."""
    name = f"package_of_{request.node.name}"
    write_package(tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def write_package(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in {"__init__": "", **files}.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("room", PACKAGES)
def test_the_names_are_the_public_files(room: str) -> None:
    folder = Path(fedtune.__file__).parent / room.removeprefix("fedtune.")
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    public = [path for path in paths if not any(part.startswith("_") for part in path.parts)]
    assert list_unit_names(room) == sorted(path.stem.replace("_", "-") for path in public)
    assert any(len(path.parts) > 1 for path in public)


def test_a_file_in_a_new_folder_is_a_unit_and_nothing_else_is_imported(package: str, tmp_path: Path) -> None:
    family = write_package(tmp_path / package / "family", planted=UNIT, other_unit=BROKEN, _helper=BROKEN)
    write_package(family / "inner", deeper=BROKEN)
    write_package(family / "_helpers", part=BROKEN)
    (family / "no_package").mkdir()
    assert list_unit_names(package) == ["deeper", "other-unit", "planted"]
    assert build_unit(package, Unit(name="planted"), "here").name == "planted"
    with pytest.raises(RecipeError, match=r"^here: there is no 'part'; allowed: deeper, other-unit, planted$"):
        build_unit(package, Unit(name="part"), "here")


def test_two_files_of_one_name_are_refused(package: str, tmp_path: Path) -> None:
    write_package(tmp_path / package / "one", same_name=UNIT)
    write_package(tmp_path / package / "two", same_name=UNIT)
    with pytest.raises(RecipeError, match=rf"^{package}\.one\.same_name and {package}\.two\.same_name both publish "):
        list_unit_names(package)


def test_to_build_one_unit_imports_no_other_family() -> None:
    """In a process of its own: bitsandbytes and PEFT take seconds to import, and only LoRA needs them."""
    code = """
import sys
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, list_unit_names
assert {"lora", "linear"} <= {*list_unit_names("fedtune.techniques"), *list_unit_names("fedtune.merging")}
build_unit("fedtune.merging", Unit(name="linear"), "here")
build_unit("fedtune.techniques", Unit(name="full"), "here")
print(*sorted(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, units = set(done.stdout.split()), set(find_unit_modules("fedtune.techniques").values())
    assert imported & units == {"fedtune.techniques.full"}
    assert not imported & {"bitsandbytes", "peft"}


def test_the_first_techniques_and_the_first_merge_are_published() -> None:
    assert {"full", "head-only", "lora", "qlora", "bias", "gradient-checkpointing"} <= set(
        list_unit_names("fedtune.techniques")
    )
    assert "mean" in list_unit_names("fedtune.merging")


@pytest.mark.parametrize(("room", "name"), UNITS)
def test_a_unit_carries_the_name_of_its_file(room: str, name: str) -> None:
    assert build_unit(room, Unit(name=name), "here").name == name


@pytest.mark.parametrize(("room", "name"), UNITS)
def test_a_card_has_every_heading_once_and_in_order(room: str, name: str) -> None:
    lines = read_unit_card(room, name).splitlines()
    cost = "Saves" if room == "fedtune.techniques" else "Memory"
    places = [
        [number for number, line in enumerate(lines) if line.startswith(f"{heading}:")]
        for heading in ("What", cost, "Use when", "Avoid when", "Source")
    ]
    assert all(len(found) == 1 for found in places), places
    assert places == sorted(places)
    assert places[0][0] > 0


@pytest.mark.parametrize(
    ("room", "name"), [*UNITS, *((room, name) for room in OTHER_ROOMS for name in list_unit_names(room))]
)
def test_settings_are_one_line_each_with_a_default(room: str, name: str) -> None:
    fields = type(build_unit(room, Unit(name=name), "here")).model_fields
    lines = describe_unit_settings(room, name)
    assert [line.split(":")[0] for line in lines] == list(fields)
    assert all(" = " in line and "\n" not in line and "Undefined" not in line for line in lines)
    kinds = [line.split(" = ")[0] for line in lines]
    assert not any(word in kind for kind in kinds for word in ("fedtune.", "typing.", "Annotated", "FieldInfo", "<"))


def test_a_settings_line_shows_type_default_and_meaning() -> None:
    lines = describe_unit_settings("fedtune.techniques", "lora")
    assert "rank: int = 8" in lines
    assert "alpha: float = 16.0   the product is scaled by alpha / rank" in lines
    [line] = [one for one in describe_unit_settings("fedtune.techniques", "deft") if one.startswith("skip_mlps")]
    assert line == "skip_mlps: SkipMlps | null = null"


@pytest.mark.parametrize(("room", "name"), UNITS)
def test_a_unit_refuses_a_key_it_does_not_know(room: str, name: str) -> None:
    with pytest.raises(RecipeError, match=f"^here, {name}: unknown key 'colour'; "):
        build_unit(room, Unit(name=name, settings={"colour": 1}), "here")


@pytest.mark.parametrize(("room", "name"), UNITS)
def test_a_unit_is_frozen(room: str, name: str) -> None:
    unit = build_unit(room, Unit(name=name), "here")
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
    with pytest.raises(RecipeError, match=r"there is no 'xyz'; allowed: activation-pruning, badam, batch-norm, "):
        call("fedtune.techniques", "xyz")
