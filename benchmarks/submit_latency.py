"""Claim: a tiny run of two rounds on devices takes at most 20 s from submit to end, of which they train under 0.1 s.

A server with TLS and device keys and two devices on the loopback address; a linear model of 31 kB, two steps a round.
`fedtune submit --watch` is timed as a user has it: the command, the check of the recipe, the run's own process and both
rounds. The first run meets devices whose trainers have yet to load torch.

Run: python -m benchmarks.submit_latency
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.devices_demo import FEDTUNE
from benchmarks.fleet import Fleet, fleet
from benchmarks.report import save

DEVICES, RUNS, LIMIT = 2, 3, 300.0
RECIPE = f"""
version: 2
name: tiny
task: image-classification
model: {{source: "sample:logistic"}}
data: {{source: "sample:digits"}}
devices: [{{name: toy, count: {DEVICES}, memory: 64MB}}]
train: {{techniques: [full], optimiser: sgd, lr: 0.03, batch_size: 10, image_size: 28, local_steps: 2}}
federation: {{rounds: 2, quorum: {DEVICES}}}
"""


def main() -> None:
    with fleet(DEVICES) as made, tempfile.TemporaryDirectory() as folder:
        until_connected(made)
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        runs = [submitted(made, recipe) for _ in range(RUNS)]
    save(
        "submit_latency",
        {"limit_seconds": 20.0, "first": runs[0], "later": runs[1:]},
    )


def until_connected(made: Fleet) -> None:
    """Wait until every device has joined."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with made.operator() as connection:
            found = connection.request_json("GET", "devices")["devices"]
        if sum(device["online"] for device in found) == DEVICES:
            return
        time.sleep(0.2)
    raise SystemExit("the devices did not join")


def submitted(made: Fleet, recipe: Path) -> dict[str, float | str]:
    """Seconds of a whole `fedtune submit --watch`, of its rounds, and of the slower device's training in them."""
    load, started = os.getloadavg()[0], time.perf_counter()
    command = [*FEDTUNE, "submit", str(recipe), "--watch"]
    subprocess.run(command, env=made.server.environment, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
    seconds = time.perf_counter() - started
    found = made.found("latest")
    rounds = [record for record in found["rounds"] if record["number"]]
    trained = sum(max(sent["seconds"] for sent in record["client_records"]) for record in rounds)
    merged = [sent["status"] for record in rounds for sent in record["client_records"]]
    assert merged == ["merged"] * (DEVICES * len(rounds)), merged
    return {
        "seconds": round(seconds, 2),
        "seconds_in_rounds": round(sum(record["seconds"] for record in rounds), 2),
        "seconds_trained": round(trained, 4),
        "status": found["status"],
        "load": round(load, 1),
    }


if __name__ == "__main__":
    main()
