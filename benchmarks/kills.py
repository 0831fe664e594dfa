"""Claim: a run killed with -9 at a random moment and resumed ends with the same bits and metrics as one left alone.

Real processes, the real command line: start, SIGKILL after a random share of an undisturbed run's time, resume until
the run completes (the resumed process is killed as well in every third case), compare the hashes of all checkpoints and
all metrics rows. Seeded; 24 cases.

Run: python -m benchmarks.kills
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import TASKS, cache
from benchmarks.report import save

CASES = 24
FEDTUNE = [sys.executable, "-m", "fedtune.cli.main"]
RECIPE = TASKS["trivial"].replace("rounds: 3", "rounds: 25")


def main() -> None:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        left_alone, first_round, seconds = undisturbed(recipe, Path(folder) / "alone")
        cases = []
        for case in range(CASES):
            delay = chance.uniform(0.8 * first_round, 1.02 * seconds)
            again = chance.uniform(0.8 * first_round, 1.02 * seconds) if case % 3 == 0 else None
            cases.append(killed(recipe, Path(folder) / f"case-{case}", delay, again, left_alone))
            print(cases[-1], file=sys.stderr, flush=True)
    hit = [case for case in cases if case["killed"]]
    equal = sum(bool(case["equal"]) for case in hit)
    save("kills", {"cases": cases, "killed": len(hit), "bit_equal": equal})


def undisturbed(recipe: Path, home: Path) -> tuple[Any, float, float]:
    """What a run left alone ends with, when its first round showed, and how long it takes."""
    started = time.perf_counter()
    process = start([*FEDTUNE, "simulate", str(recipe)], home)
    assert process.stderr is not None
    first = 0.0
    for line in process.stderr:
        if line.startswith(b"round 1/"):
            first = time.perf_counter() - started
    assert process.wait() == 0
    return outcome(home), first, time.perf_counter() - started


def killed(recipe: Path, home: Path, delay: float, again: float | None, expected: Any) -> dict[str, Any]:
    was_killed = kill_after(start([*FEDTUNE, "simulate", str(recipe)], home), delay)
    rounds = recorded_rounds(home)
    if again is not None and rounds:
        kill_after(start([*FEDTUNE, "simulate", "--resume", "latest"], home), again)
    if not rounds:
        run([*FEDTUNE, "simulate", str(recipe)], home)
    elif status(home) != "completed":
        run([*FEDTUNE, "simulate", "--resume", "latest"], home)
    return {"after": delay, "killed": was_killed, "rounds_then": rounds, "equal": outcome(home) == expected}


def start(command: list[str], home: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "FEDTUNE_HOME": str(home), "FEDTUNE_CACHE": str(cache())}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_after(process: "subprocess.Popen[bytes]", delay: float) -> bool:
    """True when the process was still at work."""
    try:
        process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode == -signal.SIGKILL


def run(command: list[str], home: Path) -> bytes:
    environment = {**os.environ, "FEDTUNE_HOME": str(home), "FEDTUNE_CACHE": str(cache())}
    return subprocess.run(command, env=environment, check=True, capture_output=True).stdout


def listed(home: Path) -> list[dict[str, Any]]:
    return json.loads(run([*FEDTUNE, "runs", "list", "--json"], home))  # type: ignore[no-any-return]


def status(home: Path) -> str:
    return str(listed(home)[0]["status"])


def recorded_rounds(home: Path) -> int:
    runs = listed(home)
    return int(runs[0]["rounds_completed"]) if runs else 0


def outcome(home: Path) -> Any:
    """Hashes of all checkpoints and all metrics rows of the newest run."""
    shown = json.loads(run([*FEDTUNE, "runs", "show", "latest", "--json"], home))
    checkpoints = [(entry["number"], entry["checkpoint"]["sha256"]) for entry in shown["rounds"]]
    return checkpoints, shown["metrics"]


if __name__ == "__main__":
    main()
