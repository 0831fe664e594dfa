"""Claim: on warm devices a phase costs at most 2.5 s beyond training, and an idle device is lighter than Flower's node.

Ours: a server with TLS and device keys, two devices, a linear model of 31 kB, one step per round; a round's seconds
less those of the slower device's training, without the first two rounds, which load torch. Stock: Flower's SuperLink
and two SuperNodes, without TLS, an app that sends as many bytes to clients that import torch and do nothing else.
Memory is the proportional set size of a waiting node's processes; a trainer, which stays, is told apart.

Run: python -m benchmarks.device_phases
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.fleet import Fleet, fleet
from benchmarks.report import save
from benchmarks.stock_flower import stock
from fedtune.recipe.yaml_file import parse_recipe

NODES, ROUNDS, STOCK_ROUNDS, COLD = 2, 12, 5, 2
RECIPE = f"""
version: 2
name: phases
task: image-classification
model: {{source: "sample:logistic"}}
data: {{source: "sample:digits"}}
devices: [{{name: toy, count: {NODES}}}]
train: {{techniques: [full], optimiser: sgd, lr: 0.03, max_grad_norm: 1.0, batch_size: 10, image_size: 28,
  local_steps: 1}}
federation: {{rounds: {ROUNDS}, quorum: {NODES}, deadline: 120}}
evaluation: {{every_n_rounds: {ROUNDS}}}
"""


def main() -> None:
    with fleet(NODES) as made:
        ours = beyond(made)
        device = made.devices[0].below()
        held = [process.memory_full_info().pss for process in device]
        torch = ["torch" in Path(f"/proc/{process.pid}/maps").read_text() for process in device]
    with tempfile.TemporaryDirectory(prefix="fedtune-stock-") as folder, stock(Path(folder), NODES) as flower:
        phases = flower.rounds(STOCK_ROUNDS)
        node = flower.idle_node()
    theirs = [phase["seconds"] - max(phase["trained"]) for phase in phases]
    save(
        "device_phases",
        {
            "seconds_beyond_training": {"fedtune": summary(ours[COLD:]), "stock": summary(theirs[COLD:])},
            "cold": {"fedtune": ours[:COLD], "stock": theirs[:COLD]},
            "idle_bytes": {"device": held[0], "trainer": sum(held[1:]), "stock": node},
            "torch_in_device": torch[0],
            "torch_in_trainer": torch[1],
        },
    )


def beyond(made: Fleet) -> list[float]:
    """Seconds of each round less those of its slower device's training."""
    run = made.submit(parse_recipe(RECIPE, "phases", []))
    found: dict[str, Any] = made.ended(run, 600)
    rounds = [record for record in found["rounds"] if record["number"]]
    return [record["seconds"] - max(sent["seconds"] for sent in record["client_records"]) for record in rounds]


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "phases": len(seconds)}


if __name__ == "__main__":
    main()
