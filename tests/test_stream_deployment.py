"""Streams on a server and two devices: the bits of the simulation, and devices that have only some of the tasks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe
from tests.federations import TRIVIAL, WORDS, execute, tiny_bert
from tests.servers import ended, joined, serving
from tests.streams import CLASSES, resolve_stream
from tests.test_deployment import hashes, submit

pytestmark = [pytest.mark.slow, pytest.mark.deployed, pytest.mark.timeout(600)]

DEVICES = [{"name": "toy", "count": 2}]
PLACES = """
stream:
  setting: domain
  tasks: [{name: kitchen, rounds: 1}, {name: garden, rounds: 1}, {name: kitchen, rounds: 1}]
"""
VERDICTS = (("fine", "good"), ("awful", "bad"))


def write_rows(path: Path, *places: str) -> None:
    rows = [
        f"the film {number} was {word},{label},{place}"
        for place in places
        for number in range(12)
        for word, label in VERDICTS
    ]
    path.write_text("text,label,place\n" + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("memory", "technique"), [([], "full"), ([{"analytic": {"fewest": 1}}], "head-only")], ids=["naive", "analytic"]
)
def test_a_deployed_stream_has_the_bits_of_a_simulated_one(
    home: Path, tmp_path: Path, memory: list[Any], technique: str
) -> None:
    home.mkdir()
    train = {**yaml.safe_load(TRIVIAL)["train"], "techniques": [technique]}
    recipe = resolve_stream({**CLASSES, "memory": memory}, devices=DEVICES, train=train)
    simulated = execute(recipe, run="simulated").hashes
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        found = ended(server, submit(server, recipe), seconds=240)
    assert found["status"] == "completed", found["reason"]
    assert hashes(found) == simulated


def test_a_device_without_a_task_declines_and_takes_part_again(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    tiny_bert(tmp_path / "bert")
    write_rows(tmp_path / "words.csv", "kitchen", "garden")
    write_rows(tmp_path / "kitchen.csv", "kitchen")
    text = WORDS.format(folder=tmp_path).replace("count: 3", "count: 2")
    text = text.replace("federation: {rounds: 2}", "federation: {}") + PLACES
    recipe = resolve_recipe(parse_recipe(text, "places", ["data.columns.domain=place"]))
    own = (f"csv:{tmp_path}/words.csv", f"csv:{tmp_path}/kitchen.csv")
    with serving(home) as server, joined(server, tmp_path, *own):
        found = ended(server, submit(server, recipe), seconds=240)
    assert found["status"] == "completed", found["reason"]
    rounds = [sorted((one["status"], one["reason"]) for one in each["client_records"]) for each in found["rounds"][1:]]
    statuses = [[status for status, _ in sent] for sent in rounds]
    assert statuses == [["merged", "merged"], ["declined", "merged"], ["merged", "merged"]]
    assert "no example of the task" in rounds[1][0][1]
