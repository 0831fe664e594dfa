"""Claim: sixteen devices on one machine complete their rounds, and the server's memory is flat from round 1 to 50.

A real server and sixteen real devices, each with a resident trainer, train low-rank adapters (about 1 MB) of a small
random BERT, one step per round. Every ten rounds: the proportional set size (shared pages counted once) of the
server's processes together. Fewer rounds, and a statement of how many, when time is up. Then what an idle device
holds, without a trainer as after a long rest and with one, and from that how many devices this machine could hold
beside the server.

Run: python -m benchmarks.device_crowd [MINUTES]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fleet import Fleet, Member, fleet
from benchmarks.random_bert import save_random_bert
from benchmarks.report import save
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe

DEVICES, ROUNDS, EVERY = 16, 50, 10
RECIPE = """
version: 2
name: crowd
task: text-classification
model: {{source: "path:{folder}/bert"}}
data: {{source: "csv:{folder}/words.csv"}}
devices: [{{name: toy, count: {devices}}}]
train: {{techniques: [{{lora: {{rank: 16}}}}], lr: 0.001, batch_size: 4, max_length: 16, local_steps: 1}}
federation: {{rounds: {rounds}, quorum: {devices}, deadline: 900}}
evaluation: {{every_n_rounds: 10}}
"""
VERDICTS = {"fine": "good", "great": "good", "awful": "bad", "dull": "bad"}
PATIENCE_SECONDS = 300.0


def main(minutes: float) -> None:
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="fedtune-crowd-") as name:
        folder = Path(name)
        recipe = made_recipe(folder)
        with fleet(DEVICES) as made:
            bare = idle(made)
            run = made.submit(recipe)
            taken, found = followed(made, run, end)
            kept = idle(made)
            trainers = [device.below()[1:] for device in made.devices]
            warm = statistics.median(memory(found) for found in trainers)
    completed = [record for record in found["rounds"] if record["number"] and record["status"] == "completed"]
    reports = [sent for record in completed for sent in record["client_records"]]
    total, server = psutil.virtual_memory().total, max(taken.values())
    save(
        "device_crowd",
        {
            "devices": DEVICES,
            "status": found["status"],
            "rounds_wanted": ROUNDS,
            "rounds": len(completed),
            "merged": sum(sent["status"] == "merged" for sent in reports),
            "seconds_per_round": statistics.median(record["seconds"] for record in completed[2:]),
            "bytes_down_up": [reports[0]["bytes_down"], reports[0]["bytes_up"]],
            "server_bytes": taken,
            "idle_device_bytes": {"before its first order": bare, "beside a trainer": kept, "a trainer": warm},
            "machine_bytes": total,
            "devices_held": {
                "idle": int((total - server) / bare),
                "with resident trainers": int((total - server) / (kept + warm)),
            },
        },
    )


def followed(made: Fleet, run: str, end: float) -> tuple[dict[int, int], dict[str, Any]]:
    """The server's memory by round, after the first one and after every tenth; the run's document when time is up."""
    taken: dict[int, int] = {}
    for number in (1, *range(EVERY, ROUNDS + 1, EVERY)):
        if not reached(made, run, number, end):
            break
        taken[number] = memory(made.server.below())
        print(f"round {number}: server {taken[number] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return taken, made.found(run)


def reached(made: Fleet, run: str, number: int, end: float) -> bool:
    """Whether a run commits a round before its end and that of the time."""
    while time.monotonic() < end:
        with made.operator() as connection:  # without the rounds, whose documents would grow in the server's memory
            found = connection.request_json("GET", f"runs/{run}?after={ROUNDS + 1}")
        if found["rounds_completed"] >= number:
            return True
        if found["status"] not in ("queued", "running"):
            return False
        time.sleep(1.0)
    return False


def memory(processes: Sequence[psutil.Process]) -> int:
    """Bytes of their proportional set sizes."""
    return sum(process.memory_full_info().pss for process in processes)


def idle(made: Fleet) -> int:
    """Median bytes of the devices' own processes, once all are connected."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        with made.operator() as connection:
            if sum(device["online"] for device in connection.request_json("GET", "devices")["devices"]) == len(
                made.devices
            ):
                break
        time.sleep(1.0)
    return int(statistics.median(memory(_own(device)) for device in made.devices))


def _own(device: Member) -> list[psutil.Process]:
    return device.below()[:1]


def made_recipe(folder: Path) -> Recipe:
    """A random BERT of four layers and verdicts on made-up films, in ``folder``; a recipe for one round more."""
    words = ["the", "film", "was", *VERDICTS, *map(str, range(200))]
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4}
    save_random_bert(folder / "bert", words, **shape)
    rows = [f"the film {row} was {word},{label}" for row in range(200) for word, label in VERDICTS.items()]
    (folder / "words.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return parse_recipe(RECIPE.format(folder=folder, devices=DEVICES, rounds=ROUNDS + 1), "crowd", [])


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
