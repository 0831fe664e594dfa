"""Claim: sixteen devices that come and go over five tasks end the run, and the ledger of each is right by hand count.

Simulated: ten phones and six tablets that drop out of 30 and 10 % of their rounds, and begin in four waves, one round
apart. Ten digits, two at a time, three rounds each, with replay within a budget. All devices are asked for scores after
each round. Deployed: sixteen real devices on this machine, five tasks of two rounds. Four join in the third task, four
are away for the second, and two leave for good before the last.

For each client, ``ledger_count`` counts its rounds, fills its matrix and computes its figures from the rows of the
store. They must equal what ``fedtune runs show --json`` says. In the simulation each score after a round is also
computed anew, by numpy from the round's checkpoint and the pictures that the client holds out.

Run: python -m benchmarks.stream_crowd [--simulated]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks.devices_demo import FEDTUNE, home
from benchmarks.fleet import Fleet, fleet
from benchmarks.ledger_count import count_client
from benchmarks.report import save
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.seeds import derive_seed
from fedtune.tracking import Store, make_file_url
from fedtune.training import get_run_context
from fedtune.training.holdout_split import split_holdout

HELD, SECONDS = 0.4, 1500.0
TASKS, ROUNDS, WAVES = 5, 3, 4
RECIPE = """
version: 2
name: stream-crowd
task: image-classification
model: {{source: "sample:logistic"}}
data: {{source: "sample:digits"}}
devices: {devices}
train: {{techniques: [full], optimiser: sgd, lr: 0.1, batch_size: 10, image_size: 28, local_steps: {steps}}}
federation: {federation}
evaluation: {{local_holdout: 0.4, clients: all}}
checkpoints: {{keep: all}}
stream:
  setting: class
  tasks: {{size: 2, rounds: {rounds}}}
  arrival: {arrival}
  memory: [{{replay: {{share: 20%}}}}]
  own_memory: {{budget: 200KB}}
"""
SIMULATED = RECIPE.format(
    devices="[{name: phone, count: 10, dropout: 0.3}, {name: tablet, count: 6, dropout: 0.1}]",
    steps=4,
    federation="{deadline: 60}",
    rounds=ROUNDS,
    arrival=f"{{staggered: 1, waves: {WAVES}}}",
)
DEPLOYED = RECIPE.format(
    devices="[{name: toy, count: 16}]", steps=4, federation="{deadline: 120}", rounds=2, arrival="together"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulated", action="store_true", help="leave out the real devices")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedtune-stream-crowd-") as folder:
        result = {"simulated": simulate(Path(folder))}
        if not chosen.simulated:
            result["deployed"] = deploy()
    save("stream_crowd", {**result, "processor_seconds": round(sum(os.times()[:4]), 1)})


def simulate(folder: Path) -> dict[str, Any]:
    recipe, place = folder / "recipe.yaml", folder / "home"
    recipe.write_text(SIMULATED, encoding="utf-8")
    subprocess.run([*FEDTUNE, "simulate", str(recipe), "--workers", "1"], env=home(place), check=True)
    document = show(place)
    found = compare(place / "store.sqlite", document)
    with Store.open(make_file_url(place / "store.sqlite")) as store:
        text = store.run(document["id"]).recipe
    return {**found, **recompute(place / "runs" / document["id"], document, text)}


def show(place: Path) -> dict[str, Any]:
    words = [*FEDTUNE, "runs", "show", "latest", "--json"]
    found = subprocess.run(words, env=home(place), check=True, capture_output=True)
    document: dict[str, Any] = json.loads(found.stdout)
    return document


def compare(store: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Compare each client's rounds, matrix and figures with the hand count, as the run's document has them."""
    records = [one for each in document["rounds"] for one in each["client_records"]]
    clients = sorted({one["client"] for one in records})
    rounds, wrong = Counter[str](), []
    for client in clients:
        counted, shown = count_client(store, document["id"], client), document["stream"]["clients"][str(client)]
        told = Counter(one["status"] for one in records if one["client"] == client)
        figures = {name: shown["figures"][name] for name in counted.figures}
        if dict(told) != counted.rounds or shown["matrix"] != counted.matrix or not is_close(figures, counted.figures):
            wrong.append(client)
        rounds += told
    return {
        "status": document["status"],
        "clients": len(clients),
        "rounds_completed": sum(one["status"] == "completed" for one in document["rounds"]) - 1,
        "client_rounds": dict(rounds),
        "clients_whose_ledger_differs": wrong,
        "scores_in_the_matrices": sum(
            score is not None
            for one in document["stream"]["clients"].values()
            for row in one["matrix"]
            for score in row
        ),
        "figures": {
            name: document["stream"]["client_figures"][name] for name in ("accuracy", "forgetting", "learning")
        },
    }


def is_close(one: dict[str, float | None], other: dict[str, float | None]) -> bool:
    pairs = [(one[name], other[name]) for name in other]
    return all(left == right or (left and right and abs(left - right) < 1e-12) for left, right in pairs)


def recompute(folder: Path, document: dict[str, Any], text: str) -> dict[str, Any]:
    """Compute each score of a state after a round anew, from its checkpoint and the pictures held out."""
    context = get_run_context(text)
    names = document["stream"]["tasks"]
    checked, different = 0, 0
    for record in document["rounds"][1:]:
        state = safetensors.numpy.load_file(folder / f"round-{record['number']:04d}.safetensors")
        for one in record["task_scores"]:
            if one["scope"].startswith("client:") and one["moment"] == "shared":
                client = int(one["scope"].removeprefix("client:"))
                task = names.index(one["task"])
                begun = min(TASKS, (record["number"] - client % WAVES - 1) // ROUNDS + 1)
                count, right = count_right(context, state, client, task, 2 * begun)
                checked += 1
                different += (count, right / count) != (one["num_predictions"], one["accuracy"])
    return {"scores_computed_anew": checked, "scores_that_differ": different}


def count_right(context: Any, state: dict[str, Any], client: int, task: int, classes: int) -> tuple[int, int]:
    """The pictures that a client holds out of a task, and how many of them the first ``classes`` rows get right."""
    rows = context.client_rows[client]
    own = rows[context.task_numbers[rows] == task]
    held_out = split_holdout(own, HELD, derive_seed(context.recipe.seed, client, "own"))[1]
    batch = context.train.make_batch(held_out.tolist())
    pixels = context.model.pixels(batch["pixel_values"]).numpy().reshape(len(held_out), -1)
    [weight] = [tensor for tensor in state.values() if tensor.ndim == 2]
    [bias] = [tensor for tensor in state.values() if tensor.ndim == 1]
    predicted = (pixels @ weight.T + bias)[:, :classes].argmax(1)
    return len(held_out), int(np.sum(predicted == batch["labels"].numpy()))


def deploy() -> dict[str, Any]:
    with fleet(16) as made:
        late, gone, leaving = made.devices[8:12], made.devices[12:], made.devices[1:3]
        for member in late:
            member.end()
        run = made.submit(parse_recipe(DEPLOYED, "stream-crowd", []))
        for number, ending, starting in ((2, gone, []), (4, [], [*late, *gone]), (8, leaving, [])):
            wait_for(made, run, number)
            for member in ending:
                member.end()
            for member in starting:
                member.start()
        document = made.ended(run, SECONDS)
        return compare(made.server.home / "store.sqlite", document)


def wait_for(made: Fleet, run: str, number: int) -> None:
    """Wait until a round is committed."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = made.found(run)
        if found["status"] not in ("queued", "running") or any(one["number"] >= number for one in found["rounds"]):
            return
        time.sleep(0.5)


if __name__ == "__main__":
    main()
