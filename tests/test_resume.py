"""A run killed with -9 at any moment and resumed ends with the same bits and the same metrics as one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.tracking import RoundRecord
from fedtune.tracking.pruning import list_kept_rounds
from tests.federations import TRIVIAL, Ended, outcome
from tests.kills import PLANTS, start

ROUNDS = 4
CASES = 12
Bits = tuple[list[str], list[tuple[int, str, str, str, float]]]


def bits(ended: Ended) -> Bits:
    """Digests of all checkpoints, and all metrics rows."""
    rows = [(r.number, m.split, m.domain, m.name, m.value) for r in ended.rounds for m in r.metrics]
    return ended.hashes, rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(TRIVIAL.replace("rounds: 2", f"rounds: {ROUNDS}"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield str(path)


@pytest.fixture(scope="module")
def left_alone(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bits, float]:
    """What a run that nobody kills ends with, and how many seconds it takes once everything is imported."""
    home = tmp_path_factory.mktemp("alone")
    start(home, "methods").join()
    started = time.monotonic()
    process = start(home, "simulate", recipe, "--json")
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_HOME", str(home))
        return bits(outcome()), seconds


def killed_after(delay: float, home: Path, *argv: str) -> bool:
    """Whether the command was still at work when it was killed."""
    process = start(home, *argv)
    process.join(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def finish(home: Path, recipe: str) -> Ended:
    """Resume the run, or begin it where there is none yet, and return what it ended with."""
    begun = (home / "runs").exists()
    if not begun or outcome().run.status != "completed":
        process = start(home, "simulate", *(["--resume", "latest"] if begun else [recipe]), "--json")
        process.join()
        assert process.exitcode == 0, (home / "printed").read_text()
    return outcome()


def as_written(rounds: list[RoundRecord]) -> list[RoundRecord]:
    """The rounds as they were committed, before any checkpoint was pruned."""
    found = [(record, record.checkpoint) for record in rounds]
    return [replace(record, checkpoint=kept and replace(kept, pruned=False)) for record, kept in found]


def assert_nothing_is_left(home: Path, run: str) -> None:
    left = sorted(path.name for path in (home / "runs" / run).iterdir())
    kept = list_kept_rounds(outcome(run).rounds)
    assert {0, ROUNDS - 1, ROUNDS} <= set(kept)
    assert left == ["lock", *(f"round-{number:04d}.safetensors" for number in kept)]
    assert not list(home.rglob("*.part"))


@pytest.mark.deployed
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(
    home: Path, recipe: str, left_alone: tuple[Bits, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, seconds = left_alone
    chance = random.Random(20261124)
    hit = 0
    for case in range(CASES):
        here = home / f"case-{case}"
        monkeypatch.setenv("FEDTUNE_HOME", str(here))
        hit += killed_after(chance.uniform(0.05, 0.75) * seconds, here, "simulate", recipe, "--json")
        if case % 3 == 0 and (here / "runs").exists():
            killed_after(chance.uniform(0.1, 0.8) * seconds, here, "simulate", "--resume", "latest", "--json")
        ended = finish(here, recipe)
        assert (ended.run.status, ended.run.rounds_completed) == ("completed", ROUNDS)
        assert bits(ended) == expected
        assert_nothing_is_left(here, ended.run.id)
    assert hit > CASES / 2


@pytest.mark.parametrize("plant", PLANTS)
def test_a_run_killed_at_this_very_point_ends_as_one_left_alone(
    home: Path, recipe: str, left_alone: tuple[Bits, float], plant: str
) -> None:
    process = start(home, "simulate", recipe, "--json", plant=plant)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (home / "printed").read_text()
    stopped = outcome()
    assert stopped.run.status == "interrupted"
    done = {"in round 0": 0, "after the commit": 3, "before the end is recorded": ROUNDS + 1}.get(plant, 2)
    assert [record.number for record in stopped.rounds] == list(range(done))
    ended = finish(home, recipe)
    assert (ended.run.status, ended.run.id) == ("completed", stopped.run.id)
    assert as_written(ended.rounds[:done]) == as_written(stopped.rounds)
    assert bits(ended) == left_alone[0]
    assert_nothing_is_left(home, ended.run.id)


def fedtune(*argv: str) -> Any:
    """What the real command prints as JSON."""
    printed = subprocess.run([*COMMAND, *argv, "--json"], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(printed)


COMMAND = [sys.executable, "-m", "fedtune.cli.main"]


def interrupt(sign: signal.Signals, line_begins: str, *argv: str) -> tuple[int, list[str]]:
    """Send a signal when the first line that begins so shows; the exit code and what was said from then on."""
    with subprocess.Popen([*COMMAND, *argv], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(line_begins):
                break
        process.send_signal(sign)
        said = [line.strip() for line in process.stderr.read().splitlines()]
    return process.returncode, [line for line in said if line and not line.startswith("round ")]


@pytest.mark.slow
def test_the_real_command_is_killed_and_resumed(
    home: Path, recipe: str, left_alone: tuple[Bits, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = interrupt(signal.SIGKILL, "round 1/", "simulate", recipe)
    assert code == -signal.SIGKILL
    [listed] = fedtune("runs", "list")
    assert (listed["status"], listed["rounds_completed"] >= 1) == ("interrupted", True)
    resumed = fedtune("simulate", "--resume", "latest")
    assert (resumed["id"], resumed["status"]) == (listed["id"], "completed")
    assert resumed["checkpoint"]["sha256"] == left_alone[0][0][-1]
    assert os.path.samefile(resumed["checkpoint"]["path"], home / "runs" / listed["id"] / "round-0004.safetensors")


def test_ctrl_c_is_one_word_and_the_run_goes_on_later(home: Path, recipe: str, left_alone: tuple[Bits, float]) -> None:
    code, said = interrupt(signal.SIGINT, "run ", "simulate", recipe)
    assert (code, said) == (130, ["stopped"])
    assert (outcome().run.status, outcome().run.reason) == ("interrupted", "stopped by the user")
    assert bits(finish(home, recipe)) == left_alone[0]
