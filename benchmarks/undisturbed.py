"""A small recipe for real devices, what it comes to when nothing is disturbed, and whether a round came to the same."""

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.devices_demo import FEDTUNE, home

__all__ = ["DEVICES", "outcome", "simulated", "small_recipe"]

DEVICES = 3


def small_recipe(name: str, rounds: int, deadline: int) -> str:
    """Some seconds of training a round for three devices of one class."""
    return f"""
version: 2
name: {name}
task: image-classification
model: {{source: "sample:logistic"}}
data: {{source: "sample:digits"}}
devices: [{{name: toy, count: {DEVICES}, memory: 1GB}}]
train: {{techniques: [full], optimiser: sgd, lr: 0.03, max_grad_norm: 1.0, batch_size: 10, image_size: 28,
  local_steps: 150}}
federation: {{rounds: {rounds}, quorum: {DEVICES}, deadline: {deadline}}}
"""


def simulated(recipe: str, folder: Path) -> list[str]:
    """The digest of each round's checkpoint when nothing is disturbed."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    subprocess.run([*FEDTUNE, "simulate", str(folder / "recipe.yaml")], env=home(folder), check=True)
    words = [*FEDTUNE, "runs", "show", "latest", "--json"]
    shown = json.loads(subprocess.run(words, env=home(folder), check=True, capture_output=True).stdout)
    return [record["checkpoint"]["sha256"] for record in shown["rounds"]]


def outcome(record: dict[str, Any] | None, found: dict[str, Any], left_alone: list[str]) -> str:
    """What became of a round, in a few words: its checkpoint is compared with that of a run left alone."""
    if record is None:
        return f"run {found['status']}: {found['reason']}"
    if record["status"] != "completed":
        return f"failed round: {record['reason']}"
    return "same bits" if record["checkpoint"]["sha256"] == left_alone[record["number"]] else "OTHER BITS"
