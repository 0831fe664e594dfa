"""``fedtune new`` writes a package that passes ``fedtune check-plugin``, and faults of a plug-in are found."""

import json
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fedtune.cli.check_plugin import check_plugin
from fedtune.cli.new import new
from fedtune.errors import FedtuneError
from fedtune.library.method_list import describe_method
from fedtune.library.plug_in_check import check_plug_in
from tests.installed import TECHNIQUE, install
from tests.test_plug_ins import STEP

KINDS = {"technique": "technique", "task": "task", "merge-step": "merge"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_found_and_passes_every_check(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"fresh-{kind}"
    folder = tmp_path / "package"
    done = CliRunner().invoke(new, [kind, name, "-o", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    points = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]
    install(folder, f"fedtune-{name}", points)
    monkeypatch.syspath_prepend(folder)
    assert describe_method(KINDS[kind], name).package == f"fedtune-{name}"
    checked = CliRunner().invoke(check_plugin, [name], catch_exceptions=False)
    assert checked.exit_code == 0, checked.output
    assert checked.output.endswith(f"{name}: all checks passed\n")
    assert checked.output.count("ok  ") >= 6
    [test] = (folder / "tests").glob("test_*.py")
    found = runpy.run_path(str(test))
    assert {name for name in found if name.startswith("test_")} == {"test_it_passes_the_checks_of_fedtune"}
    if kind == "merge-step":  # the others would check again what the command has just checked
        found["test_it_passes_the_checks_of_fedtune"]()
    with pytest.raises(FedtuneError, match="there is a method 'fresh-"):
        CliRunner().invoke(new, [kind, name, "-o", str(tmp_path / "again")], catch_exceptions=False)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["technique", "lora"], "there is a method 'lora' already"),
        (["technique", "My_Thing"], "'My_Thing' is no name for a technique; write small letters"),
        (["task", "fine-name", "-o", "."], "exists already; choose another folder"),
    ],
)
def test_a_new_package_is_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedtuneError, match=message):
        CliRunner().invoke(new, words, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


UNFREEZE = "            parameter.requires_grad_(True)\n"
SPOIL = "for one in merge_inputs:\n            one.read_rows._state[name].zero_()\n        "
FAULTS = {
    "frozen weights": (
        "techniques",
        TECHNIQUE.replace(UNFREEZE, UNFREEZE + "            parameter.register_hook(lambda one: one * float('nan'))\n"),
        "gradients reach",
        "is not finite",
    ),
    "no gradient": (
        "techniques",
        TECHNIQUE.replace(UNFREEZE, UNFREEZE + "            parameter.register_hook(lambda one: one * 0)\n"),
        "gradients reach",
        "no parameter gets a gradient",
    ),
    "random start": (
        "techniques",
        TECHNIQUE.replace(UNFREEZE, UNFREEZE + "            nn.init.normal_(parameter.data)\n"),
        "the same seed",
        "differs between two runs",
    ),
    "no fold": (
        "techniques",
        TECHNIQUE + '\n    def _fold(self, model: nn.Module) -> None:\n        """Zero."""\n'
        "        for parameter in model.parameters():\n            parameter.data.zero_()\n",
        "merges into plain layers",
        "differ by 1 of their norm",
    ),
    "a required setting": (
        "techniques",
        TECHNIQUE.replace("Field(1.0, gt=0", "Field(gt=0"),
        "builds with its default settings",
        "the key 'share' is missing",
    ),
    "other chunks": (
        "merging",
        STEP.replace("yield rows * self.scale", "yield from (rows, rows)"),
        "merges a matrix",
        "the chunks are not those",
    ),
    "changed inputs": (
        "merging",
        STEP.replace("for rows in Mean", SPOIL + "for rows in Mean"),
        "merges a matrix",
        "the step changes its inputs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_said(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, text, what, reason = FAULTS[fault]
    module = f"faulty_{fault.replace(' ', '_')}"
    name, kind = ("last-layer", "LastLayer") if group == "techniques" else ("half-mean", "HalfMean")
    install(tmp_path, "faulty", {f"fedtune.{group}": {name: f"{module}:{kind}"}}, {module: text})
    monkeypatch.syspath_prepend(tmp_path)
    failed = [one for one in check_plug_in(name) if one.status == "failed"]
    assert [one for one in failed if what in one.what and reason in one.reason], failed


def test_the_command_prints_json_and_ends_with_two_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "faulty", {"fedtune.metrics": {"vague": "faulty_metric:vague"}}, {"faulty_metric": "vague = 3\n"})
    monkeypatch.syspath_prepend(tmp_path)
    done = CliRunner().invoke(check_plugin, ["vague", "--json"])
    assert done.exit_code == 2
    [row] = json.loads(done.stdout)
    assert (row["status"], row["what"]) == ("failed", "measures probabilities")
    shown = CliRunner().invoke(check_plugin, ["vague"]).output
    assert "FAIL  measures probabilities: TypeError" in shown
    assert "vague: 1 of 1 checks failed" in shown
    with pytest.raises(FedtuneError, match="there is no method 'vage'; did you mean 'vague'"):
        CliRunner().invoke(check_plugin, ["vage"], catch_exceptions=False)


@pytest.mark.parametrize("name", ["bias", "deft", "slerp", "fisher", "qlora", "text-classification", "noise"])
def test_units_of_fedtune_pass(name: str) -> None:
    results = list(check_plug_in(name))
    assert not [one for one in results if one.status == "failed"]
    assert sum(one.status == "ok" for one in results) >= 4
