"""A run of everything that changes between rounds, killed with -9: a centre, an attack, a schedule, an early end."""

import signal
from pathlib import Path

import pytest

from tests.federations import TRIVIAL, outcome
from tests.kills import start
from tests.test_robust_runs import rows

RECIPE = TRIVIAL.replace(
    "[{name: toy, count: 4, memory: 64MB}]",
    "[{name: toy, count: 4, memory: 64MB}, {name: bad, count: 1, attack: {noise: {scale: 2}}}]",
).replace(
    "{rounds: 2}",
    "{rounds: 9, schedule: [{from_round: 2, local_steps: 3}], early_stopping: {patience: 3, min_improvement: 0.9}}\n"
    "merge: [centred-clipping]",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "done"), [("before the commit", 2), ("after the commit", 3), ("before the end is recorded", 4)]
)
def test_a_killed_run_ends_as_one_left_alone(
    home: Path, tmp_path: Path, plant: str, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = start(home, "simulate", str(recipe), "--json", plant=plant)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (home / "printed").read_text()
    stopped = outcome()
    assert len(stopped.rounds) == done
    process = start(home, "simulate", "--resume", "latest", "--json")
    process.join()
    assert process.exitcode == 0, (home / "printed").read_text()
    killed = outcome()
    monkeypatch.setenv("FEDTUNE_HOME", str(home / "alone"))
    start(home / "alone", "simulate", str(recipe), "--json").join()
    alone = outcome()
    assert (killed.hashes, rows(killed)) == (alone.hashes, rows(alone))
    assert killed.run.reason == alone.run.reason != ""
    memories = [[one.checkpoint and one.checkpoint.memory_sha256 for one in ended.rounds] for ended in (killed, alone)]
    assert memories[0] == memories[1]
    assert None not in memories[0][1:]
