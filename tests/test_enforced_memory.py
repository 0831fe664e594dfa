"""The memory of device classes in a simulation: enforced, or compared with what clients held."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.device.client_app import limited
from fedtune.errors import RecipeError, RunError
from fedtune.memory.limits import can_limit_memory
from fedtune.simulation import enforcement
from fedtune.simulation.enforcement import describe_memory_excesses, require_enforceable
from tests.federations import execute, outcome, trivial
from tests.store_examples import a_client_record, a_round

MEGABYTE = 10**6
LIMITED = pytest.mark.skipif(not can_limit_memory(), reason="this system limits no private memory")


@LIMITED
def test_a_run_within_its_memory_has_the_bits_of_one_without_a_limit(home: Path) -> None:
    recipe = trivial("devices=[{count: 4, memory: 100GB}]")
    free, held = execute(recipe, run="free"), execute(recipe, limited, run="held")
    assert free.hashes == held.hashes
    assert {one.status for record in held.rounds for one in record.client_records} == {"merged"}
    assert all(one.anonymous_memory for record in held.rounds for one in record.client_records)


@LIMITED
def test_clients_whose_class_is_too_small_decline_with_both_numbers(home: Path) -> None:
    recipe = trivial("devices=[{count: 4, memory: 20MB}]", "federation.rounds=1")
    with pytest.raises(RunError, match="no round got enough"):
        execute(recipe, limited)
    ended = outcome()
    reasons = {one.reason for record in ended.rounds for one in record.client_records}
    assert {one.status for record in ended.rounds for one in record.client_records} == {"declined"}
    assert all("a step needs about" in one and "this device allows 20 MB" in one for one in reasons)


def test_an_excess_is_told_once_for_each_class_with_both_numbers() -> None:
    recipe = trivial("devices=[{name: phone, count: 2, memory: 512MB}, {name: tablet, count: 2, memory: 2GB}]")
    held = [
        a_client_record(0, anonymous_memory=700 * MEGABYTE, file_memory=300 * MEGABYTE),
        a_client_record(1, anonymous_memory=500 * MEGABYTE, file_memory=10 * MEGABYTE),
        a_client_record(2, anonymous_memory=1_900 * MEGABYTE, file_memory=90 * MEGABYTE),
    ]
    [said] = describe_memory_excesses(recipe, [a_round(1, client_records=tuple(held))])
    assert said.startswith("a client of device class phone held 764 MB, and the recipe gives it 512 MB; raise")
    whole = a_client_record(2, peak_memory=3_000 * MEGABYTE, anonymous_memory=None, file_memory=None)
    [said] = describe_memory_excesses(recipe, [a_round(1, client_records=(whole,))])
    assert "class tablet held 3,000 MB, and the recipe gives it 2,000 MB" in said
    assert describe_memory_excesses(recipe, [a_round(1, client_records=tuple(held[1:]))]) == []


def test_what_cannot_be_enforced_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="use --engine in-process"):
        require_enforceable(trivial(), "flower")
    monkeypatch.setattr(enforcement, "can_limit_memory", lambda: False)
    with pytest.raises(RecipeError, match="run it on Linux, or leave it out"):
        require_enforceable(trivial(), "in-process")
    monkeypatch.setattr(enforcement, "uses_accelerator", lambda _: True)
    with pytest.raises(RecipeError, match=r"set train\.device to cpu"):
        require_enforceable(trivial(), "in-process")


def test_a_refused_run_leaves_nothing_in_the_store(home: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(trivial().model_dump_json())
    argv = ["simulate", str(tmp_path / "recipe.yaml"), "--enforce-memory", "--engine", "flower"]
    done = CliRunner().invoke(cli, argv)
    assert isinstance(done.exception, RecipeError)
    assert "No runs" in CliRunner().invoke(cli, ["runs", "list"]).output or not list(home.glob("runs/*"))
