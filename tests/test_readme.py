"""The README's first sequence with devices works as it is written."""

import re
from pathlib import Path

import pytest

from fedtune.cli.device import MemorySize
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.recipe.yaml_file import read_recipe
from fedtune.simulation import resolve_recipe
from fedtune.training import clear_run_context, get_model_state, get_run_context
from fedtune.wire.client_update import pack
from fedtune.wire.masked_weights import encode_masked_state

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOIN = re.compile(r"^fedtune device join --data (\S+) --memory (\S+)", re.MULTILINE)
SUBMIT = re.compile(r"^fedtune submit (\S+) --watch", re.MULTILINE)


@pytest.mark.slow
def test_a_device_joined_as_the_readme_says_trains_the_recipe_it_submits(home: Path) -> None:
    [(source, allowed)], [recipe_file] = JOIN.findall(README), SUBMIT.findall(README)
    recipe = resolve_recipe(read_recipe(ROOT / recipe_file, ["train.local_steps=1"]))
    memory = MemorySize().convert(allowed, None, None)
    assert recipe.num_clients == 4, "as many devices as the README says"
    assert memory >= max(device.memory for device in recipe.devices)
    text = recipe.model_dump_json()
    shop = get_run_context(text)
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    clear_run_context()
    keeper = TrainerSupervisor(source, memory, 60.0)
    try:
        answer = keeper.run_request(
            Frame({"recipe": text, "round": 1, "client": 0, "label_names": "[]", "run_id": "run"}, payload)
        )
    finally:
        keeper.stop_trainer()
    assert answer.header["kind"] == "trained", answer.header
