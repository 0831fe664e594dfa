"""A real device whose memory is really short: it trains in micro-batches within it, or declines before it trains."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.device.held_memory import count_held_bytes
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe
from tests.federations import tiny_bert
from tests.servers import Device, Server, ended, joined, serving
from tests.test_deployment import submit

pytestmark = pytest.mark.deployed

RECIPE = """
version: 2
name: long-words
task: text-classification
model: {{source: "path:{folder}/bert"}}
data: {{source: "csv:{folder}/words.csv"}}
devices: [{{name: toy, count: 1}}]
train: {{techniques: [full], optimiser: sgd, lr: 0.1, max_grad_norm: 1.0, batch_size: 128, max_length: 128,
  local_steps: 1}}
federation: {{rounds: 1}}
"""


def long_words(folder: Path) -> Recipe:
    """A BERT wide enough, on sentences long enough, that a batch keeps some hundred megabytes."""
    tiny_bert(folder / "bert", width=256)
    config = folder / "bert" / "config.json"
    settings = {**json.loads(config.read_text()), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(settings))
    said = " ".join(["the film was"] * 40)
    rows = [f"{said} {row} {word},{label}" for row in range(120) for word, label in (("fine", "good"), ("dull", "bad"))]
    (folder / "words.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return resolve_recipe(parse_recipe(RECIPE.format(folder=folder), "long-words", []))


class Ended:
    """A run of one device and one round."""

    def __init__(self, found: dict[str, Any]) -> None:
        [self.sent] = found["rounds"][1]["client_records"]
        self.failed, self.checkpoint = found["rounds"][1]["reason"], found["rounds"][1]["checkpoint"]

    @property
    def held(self) -> int:
        """What counts against a budget."""
        return count_held_bytes(self.sent["anonymous_memory"], self.sent["file_memory"])

    @property
    def weights(self) -> dict[str, Tensor]:
        return checkpoint.read_checkpoint(homes.get_runs_folder() / self.checkpoint["path"], self.checkpoint["sha256"])


def a_round(server: Server, device: Device, recipe: Recipe, memory: int) -> Ended:
    """A run of one round with the device, joined anew with so much memory."""
    device.process.terminate()
    device.process.wait(30)
    device.memory = memory
    device.again()
    return Ended(ended(server, submit(server, recipe), 300))


def test_a_device_trains_within_what_it_allows_or_declines(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
    home.mkdir()
    recipe = long_words(tmp_path)
    with serving(home) as server, joined(server, tmp_path, "partition:0") as [device]:
        ample = a_round(server, device, recipe, 2 * 10**9)
        allowed = ample.held - ample.sent["activation_memory"] // 2
        short = a_round(server, device, recipe, allowed)
        none = a_round(server, device, recipe, 10**8)
    assert (ample.sent["status"], ample.sent["reason"]) == ("merged", "")
    assert short.sent["status"] == "merged"
    told = re.fullmatch(r"in micro-batches of (\d+), to fit its memory", short.sent["reason"])
    assert told, short.sent["reason"]
    size = int(told[1])  # how much of its memory a process gives back differs between machines
    assert size in {4, 8, 16, 32, 64}
    assert short.held <= allowed
    assert short.sent["activation_memory"] == pytest.approx(ample.sent["activation_memory"] * size / 128, rel=0.01)
    assert short.sent["num_examples"] == ample.sent["num_examples"] == 128
    for name, weight in ample.weights.items():
        torch.testing.assert_close(short.weights[name], weight, rtol=1e-4, atol=1e-6)
    assert none.sent["status"] == "declined"
    assert none.sent["reason"].startswith("holding model and data takes more than the 100 MB this device allows")
    assert "declined" in none.failed
