"""Claim: `fedtune --help` and `fedtune runs list` answer within 0.5 s.

Whole processes, ten of each after one that warms the disk cache; the store holds 20 runs of 5 rounds.

Run: python -m benchmarks.startup
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import save
from fedtune.tracking import RoundRecord, Store, make_file_url

FEDTUNE = str(Path(sys.executable).parent / "fedtune")
COMMANDS = (["--help"], ["runs", "list"])
REPEATS = 10


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(make_file_url(Path(folder) / "store.sqlite"))
        environment = {**os.environ, "FEDTUNE_HOME": folder}
        medians = {" ".join(command): measured(command, environment) for command in COMMANDS}
    save("startup", {"median_seconds": medians})


def fill(url: str) -> None:
    with Store.open(url) as store:
        for run in range(20):
            store.create_run(id=f"run-{run}", name="run", recipe="{}", seed=0, engine="in-process", rounds_planned=5)
            for number in range(6):
                store.commit_round(f"run-{run}", empty_round(number))


def empty_round(number: int) -> RoundRecord:
    return RoundRecord(
        number=number, status="completed", reason="", seconds=1.0, client_records=(), metrics=(), checkpoint=None
    )


def measured(command: list[str], environment: dict[str, str]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        subprocess.run([FEDTUNE, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
