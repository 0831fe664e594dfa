"""Renamed commands, options and values: the old name works, and one line says the new one."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.cli.old_names import COMMANDS, OPTIONS, VALUES, translate_old_names
from fedtune.tracking import Store
from tests.federations import execute, trivial
from tests.store_examples import start


def find_command(path: str) -> click.Command:
    command: click.Command = cli
    for word in path.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None, path
        command = found
    return command


def list_shown_names(path: str) -> set[str]:
    """Options that the help of a command shows, or of any command of a group."""
    command = find_command(path)
    commands = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    options = [one for each in commands for one in each.params if isinstance(one, click.Option)]
    return {name for one in options if not one.hidden for name in one.opts}


@pytest.mark.parametrize("path", OPTIONS)
def test_the_help_shows_the_new_options_alone(path: str) -> None:
    for old, new in OPTIONS[path].items():
        assert old not in list_shown_names(path)
        if new.startswith("--"):
            assert new in list_shown_names(path)
        else:
            group, command, *_ = new.removeprefix("fedtune ").split()
            find_command(f"{group} {command}")


def test_the_help_shows_the_new_commands_alone() -> None:
    for old, new in COMMANDS.items():
        group, name = old.split()
        listed = find_command(group).list_commands(click.Context(cli))  # type: ignore[attr-defined]
        assert new in listed
        assert name not in listed


def test_new_values_are_choices_and_old_ones_are_not() -> None:
    for path, options in VALUES.items():
        for option, values in options.items():
            [found] = [one for one in find_command(path).params if option in one.opts]
            if isinstance(found.type, click.Choice):
                assert set(values.values()) <= set(found.type.choices)
                assert not set(values) & set(found.type.choices)


@pytest.mark.parametrize(
    ("old", "new", "notices"),
    [
        ("evaluate latest --part test", "evaluate latest --split test", ["--part is called --split now"]),
        ("evaluate latest --part=test", "evaluate latest --split=test", ["--part is called --split now"]),
        ("merge a b --base=x=y --as adapter", "merge a b --base-model=x=y --format adapter", [
            "--base is called --base-model now", "--as is called --format now"]),
        ("server token --hours 2 --server f", "server create-token --valid-hours 2 --operator-file f", [
            "server token is called server create-token now", "--hours is called --valid-hours now",
            "--server is called --operator-file now"]),
        ("export latest --format full", "export latest --format model", ["--format full is called --format model now"]),
        ("export latest --format=full", "export latest --format=model", ["--format full is called --format model now"]),
        ("simulate r.yaml --engine local", "simulate r.yaml --engine in-process", [
            "--engine local is called --engine in-process now"]),
        ("device join --data part:0 --idle 2", "device join --data partition:0 --trainer-idle-timeout 2", [
            "--idle is called --trainer-idle-timeout now", "--data part:0 is called --data partition:0 now"]),
        ("server devices --tag one attic", "server devices --tag one attic", [
            "--tag is called fedtune server tag DEVICE --add TAG now"]),
        ("runs export latest --format full", "runs export latest --format full", []),
        ("simulate r.yaml -- --part", "simulate r.yaml -- --part", []),
        ("merge full local", "merge full local", []),
        ("device join --data csv:part:0", "device join --data csv:part:0", []),
        ("--help", "--help", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_names_are_translated(old: str, new: str, notices: list[str]) -> None:
    assert translate_old_names(old.split()) == (new.split(), notices)
    assert translate_old_names(new.split())[0] == new.split()


def test_an_old_option_does_what_the_new_one_does_and_one_line_says_so(home: Path) -> None:
    execute(trivial("federation.rounds=1"), run="run-1")
    new = CliRunner().invoke(cli, ["evaluate", "run-1", "--split", "test", "--json"])
    old = CliRunner().invoke(cli, ["evaluate", "run-1", "--part", "test", "--json"])
    assert json.loads(old.stdout) == json.loads(new.stdout)
    assert (new.stderr, old.stderr) == ("", "fedtune: --part is called --split now\n")


def test_completion_prints_no_notices(capsys: pytest.CaptureFixture[str]) -> None:
    cli.make_context("fedtune", ["evaluate", "latest", "--part", "test"], resilient_parsing=True)
    assert capsys.readouterr().err == ""


def test_a_run_of_the_engine_local_is_one_of_the_engine_in_process(home: Path) -> None:
    with Store.open() as store:
        start(store, "old", engine="local")
        assert store.run("old").engine == "in-process"
