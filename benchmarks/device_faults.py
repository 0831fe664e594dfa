"""Claim: whatever is killed with -9 in whatever phase of a round, a deployed run ends with the bits of one left alone.

A real server, three real devices, a small recipe. For each victim and each phase of a round: wait until a round is in
that phase, stop the victim, look whether the phase still holds (else let it go on and take the next round), kill it
with -9, start again what an init system would start again, and go on. A second server keeps its store in a PostgreSQL
of its own, which is killed. What the run holds in the end is compared, round by round, with the same recipe simulated.

Run: python -m benchmarks.device_faults [VICTIM ...]
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fleet import Fleet, fleet
from benchmarks.phase_kills import kill_in_phase, until_committed
from benchmarks.phases import PHASES, VICTIMS, Watch
from benchmarks.report import save
from benchmarks.scratch_database import Database
from benchmarks.undisturbed import DEVICES, outcome, simulated, small_recipe
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.tracking import Store, make_file_url

DATABASE = "PostgreSQL"
DEADLINE = 120
KILLS = dict.fromkeys((*VICTIMS, DATABASE), 1) | {"device": 2, "SuperLink": 2}
"""How often each victim is killed in each phase."""
ROUNDS = 1 + 2 * max(KILLS.values()) * len(PHASES) + 3
"""A kill in every other round, and some for those that came too late."""


RECIPE = small_recipe("faults", ROUNDS, DEADLINE)
PATIENCE = 4.0 * DEADLINE
RESULTS = Path(__file__).parent / "results"


@dataclass
class Kill:
    """One kill: of what, when, what came of it, and how much longer its round and the next took than in peace."""

    victim: str
    phase: str
    round: int
    outcome: str = ""
    seconds: float = 0.0


def main(chosen: list[str]) -> None:
    recipe = parse_recipe(RECIPE, "faults", [])
    with tempfile.TemporaryDirectory(prefix="fedtune-faults-") as folder:
        left_alone = simulated(RECIPE, Path(folder) / "simulated")
        kills: list[Kill] = []
        if served := [victim for victim in VICTIMS if victim in chosen or not chosen]:
            with fleet(DEVICES) as made:
                for victim in served:
                    kills += disturbed(made, recipe, victim, left_alone)
        if DATABASE in chosen or not chosen:
            with database(Path(folder) / "database") as kept, fleet(DEVICES, store=kept.url) as made:
                kills += disturbed(made, recipe, DATABASE, left_alone, kept)
    keep([kill for kill in earlier() if kill.victim not in {one.victim for one in kills}] + kills)


def earlier() -> list[Kill]:
    """The kills of the last time, of which those of other victims stay: the matrix may be made in parts."""
    path = RESULTS / "device_faults.json"
    return [Kill(**case) for case in json.loads(path.read_text())["cases"]] if path.exists() else []


def keep(kills: list[Kill]) -> None:
    """Save all kills, and print them as a table."""
    print(table(kills))
    outcomes = {kill.outcome: sum(one.outcome == kill.outcome for one in kills) for kill in kills}
    longest = max(kill.seconds for kill in kills)
    shown = {"kills": len(kills), "outcomes": outcomes, "longest_seconds": longest, "deadline": DEADLINE}
    save("device_faults", {**shown, "recipe": RECIPE, "cases": [asdict(kill) for kill in kills]})


@contextmanager
def database(folder: Path) -> Iterator[Database]:
    folder.parent.chmod(0o755)  # its server runs as another user
    kept = Database(folder)
    try:
        yield kept
    finally:
        kept.close()


def disturbed(
    made: Fleet, recipe: Recipe, victim: str, left_alone: list[str], kept: Database | None = None
) -> list[Kill]:
    """Kill the victim in every phase; what came of it. A new run is begun when one has failed a round, or has ended."""
    kills: list[Kill] = []
    url = kept.url if kept else make_file_url(made.server.home / "store.sqlite")
    with Store.open(url) as store:
        while phases := (PHASES * KILLS[victim])[len(kills) :]:
            watch = Watch(made, store, made.submit(recipe))
            kills += in_one_run(watch, victim, phases, left_alone, kept)
    return kills


def in_one_run(
    watch: Watch, victim: str, phases: tuple[str, ...], left_alone: list[str], kept: Database | None
) -> list[Kill]:
    """Kill the victim in each of the phases, until a round fails; what came of it once the run has ended."""
    kills: list[Kill] = []
    for phase in phases:
        number = kill_in_phase(watch, victim, phase, ROUNDS, PATIENCE, kept)
        if number is None:
            break
        kills.append(Kill(victim, phase, number))
        print(f"{victim} killed in round {number}, {phase}", file=sys.stderr, flush=True)
        until_committed(watch, number, PATIENCE)
        if any(record.status == "failed" for record in watch.store.rounds(watch.run)):
            break
    if watch.made.found(watch.run)["status"] == "running" and len(kills) < len(phases):
        with watch.made.operator() as connection:
            connection.request_json("POST", f"runs/{watch.run}/stop")
    judge(kills, watch.made.ended(watch.run, PATIENCE), watch.folder, left_alone)
    for kill in kills:
        print(kill, file=sys.stderr, flush=True)
    return kills


def judge(kills: list[Kill], found: dict[str, Any], folder: Path, left_alone: list[str]) -> None:
    """Outcome and seconds of each kill, from the run's document and the times of its checkpoints."""
    rounds = {record["number"]: record for record in found["rounds"]}
    lost = seconds_lost([kill.round for kill in kills], folder)
    for kill in kills:
        kill.outcome = outcome(rounds.get(kill.round), found, left_alone)
        kill.seconds = lost[kill.round]


def seconds_lost(struck: list[int], folder: Path) -> dict[int, float]:
    """How much longer a round with a kill and the next one, which may begin cold, took than two rounds in peace."""
    made = [path.stat().st_mtime for path in sorted(folder.glob("round-????.safetensors"))]
    took = {number: made[number] - made[number - 1] for number in range(2, len(made))}
    touched = {number + after for number in struck for after in (0, 1)}
    calm = statistics.median([took[number] for number in took.keys() - touched] or took.values())
    pairs = {number: [took[one] for one in (number, number + 1) if one in took] for number in struck}
    return {number: sum(pair) - calm * len(pair) for number, pair in pairs.items()}


def table(kills: list[Kill]) -> str:
    """Victim by phase: outcome, and seconds lost in each kill."""
    lines = [f"{'':12}" + "".join(f"{phase:>24}" for phase in PHASES)]
    for victim in dict.fromkeys(kill.victim for kill in kills):
        cells = []
        for phase in PHASES:
            met = [kill for kill in kills if (kill.victim, kill.phase) == (victim, phase)]
            said = " / ".join(sorted({kill.outcome for kill in met})) or "not met"
            cells.append(f"{said} {', '.join(f'{kill.seconds:.0f}' for kill in met)} s")
        lines.append(f"{victim:12}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
