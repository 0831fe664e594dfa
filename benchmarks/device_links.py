"""Claim: bad lines, full disks and wrong clocks cost a deployed run time and nothing else.

A real server and three real devices, the first of which lives in a network namespace of its own behind a line that can
be cut, slow or lossy; the server and the second device keep their homes on small disks of their own. Each trouble comes
after the first round of a run, and the run is compared with the same recipe simulated. Needs root and a C compiler.

Run: python -m benchmarks.device_links [TROUBLE ...]
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bad_line import HERE, BadLine, bad_line
from benchmarks.fleet import Fleet, Member, fleet
from benchmarks.report import save
from benchmarks.undisturbed import DEVICES, outcome, simulated, small_recipe
from benchmarks.wrong_clock import wrong_clock
from fedtune.recipe.yaml_file import parse_recipe

ROUNDS, DEADLINE = 5, 300
RECIPE = small_recipe("troubles", ROUNDS, DEADLINE)
CUT_SECONDS, FULL_SECONDS = 90.0, 30.0
DISK = "96m"
RESULT = Path(__file__).parent / "results" / "device_links.json"


@dataclass(frozen=True)
class Bench:
    """What there is to make trouble with."""

    made: Fleet
    line: BadLine
    run: str


def main(chosen: list[str]) -> None:
    with ExitStack() as held:
        work = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="fedtune-links-")))
        left_alone = simulated(RECIPE, work / "simulated")
        line = held.enter_context(bad_line())
        for name in ("server", "device-1"):
            held.enter_context(disk(work / name))
        made = held.enter_context(fleet(0, address=HERE, folder=work))
        for number in range(DEVICES):
            made.enrol(number, f"partition:{number}", line.inside if number == 0 else ()).start()
        found = {name: tried(made, line, name, left_alone) for name in TROUBLES if name in chosen or not chosen}
    earlier = json.loads(RESULT.read_text())["troubles"] if RESULT.exists() else {}
    save("device_links", {"deadline": DEADLINE, "recipe": RECIPE, "troubles": earlier | found})


def tried(made: Fleet, line: BadLine, name: str, left_alone: list[str]) -> dict[str, Any]:
    """Run the recipe with a trouble from its first round on: what came of each round, and how long the run took."""
    begun, said = time.monotonic(), {device.name: len(device.log.read_bytes()) for device in made.devices}
    run = made.submit(parse_recipe(RECIPE, "troubles", []))
    until_round(made, run, 1)
    passed, dropped = line.passed, line.dropped
    with TROUBLES[name](Bench(made, line, run)):
        found = made.ended(run, 4.0 * DEADLINE)
    outcomes = sorted({outcome(record, found, left_alone) for record in found["rounds"]})
    lines = [line for device in made.devices for line in device.log.read_bytes()[said[device.name] :].splitlines()]
    folder = str(made.server.home.parent)
    troubles = sorted({text.decode()[9:].replace(folder, "") for text in lines if b"trained" not in text})
    result = {
        "status": found["status"],
        "rounds": len(found["rounds"]) - 1,
        "outcomes": outcomes,
        "seconds": time.monotonic() - begun,
        "packets": {"passed": line.passed - passed, "dropped": line.dropped - dropped},
        "devices_said": troubles,
    }
    print(name, result, file=sys.stderr, flush=True)
    return result


def until_round(made: Fleet, run: str, number: int) -> None:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        rounds = made.found(run)["rounds"]
        if rounds and rounds[-1]["number"] >= number:
            return
        time.sleep(0.1)
    raise SystemExit(f"round {number} did not come: {made.found(run)['reason']}")


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A small disk of its own for a home."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "fedtune", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@contextmanager
def nothing(_: Bench) -> Iterator[None]:
    yield


@contextmanager
def bad(bench: Bench, delay: float, loss: float) -> Iterator[None]:
    bench.line.delay, bench.line.loss = delay, loss
    try:
        yield
    finally:
        bench.line.delay = bench.line.loss = 0.0


@contextmanager
def cut(bench: Bench) -> Iterator[None]:
    bench.line.cut = True
    time.sleep(CUT_SECONDS)
    bench.line.cut = False
    yield


@contextmanager
def device_full(bench: Bench) -> Iterator[None]:
    """The disk of a device is full for the rest of the run."""
    with full(bench.made.devices[1].home):
        yield


@contextmanager
def server_full(bench: Bench) -> Iterator[None]:
    """The server's disk is full for a while."""
    with full(bench.made.server.home):
        time.sleep(FULL_SECONDS)
    yield


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte more goes to the disk of ``folder``."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def skewed(bench: Bench) -> Iterator[None]:
    """A device dies and starts again with a clock that is a month behind; told to stop, it would leave the round."""
    device: Member = bench.made.devices[2]
    right = device.environment
    assert device.process is not None
    device.process.kill()
    device.process.wait()
    device.environment = right | wrong_clock(device.home)
    device.start()
    try:
        yield
    finally:
        device.end()
        device.environment = right
        device.start()


TROUBLES: dict[str, Callable[[Bench], Any]] = {
    "none": nothing,
    "300 ms each way": partial(bad, delay=0.3, loss=0.0),
    "5 % loss each way": partial(bad, delay=0.0, loss=0.05),
    "cut for 90 s": cut,
    "device's disk full": device_full,
    "server's disk full": server_full,
    "clock a month behind": skewed,
}


if __name__ == "__main__":
    main(sys.argv[1:])
