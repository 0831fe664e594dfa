"""A run of each kind of task: stopped and resumed it has the same bits, and with one client it is a plain loop."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from flwr.app import Message
from torch import nn

from fedtune import checkpoint
from fedtune.device.client_app import app
from fedtune.library.exported_run import export_run
from fedtune.paths import get_runs_folder
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store, claim_run
from fedtune.training import clear_run_context, get_run_context
from fedtune.training.batches import batches
from tests.federations import execute, outcome, silent, spoilt, trivial
from tests.installed import install
from tests.servers import ended, joined, serving
from tests.task_cases import task_recipe
from tests.test_deployment import hashes, statuses, submit
from tests.test_plug_ins import TASK

SHORT = ("federation.rounds=2", "train.local_steps=1", "evaluation.max_examples=8")
WITH_STATE = ("preference", "fill-mask", "feature-extraction", "token-classification")
"""References, masks that are drawn, negatives of the batch, and tags of words: what could be lost by a stop."""


def stop(message: Message, reply: Message) -> Message:
    raise KeyboardInterrupt


def stop_and_resume(recipe: Recipe) -> list[str]:
    """The checkpoints of a run that stops in round 2 and is resumed as by a new process."""
    clear_run_context()
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, spoilt(stop, {0}, rounds={2}), run="stopped")
    assert outcome("stopped").run.rounds_completed == 1
    clear_run_context()
    with Store.open() as store, claim_run("stopped"), silent():
        store.reopen("stopped")
        run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, "stopped")
    return outcome("stopped").hashes


@pytest.mark.parametrize("case", WITH_STATE)
def test_a_run_that_is_stopped_and_resumed_has_the_same_bits(case: str, home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(case, tmp_path, *SHORT, rows=60)
    clear_run_context()
    alone = execute(recipe, run="alone").hashes
    assert stop_and_resume(recipe) == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("case", ["text-classification", "text-generation", "text2text-generation"])
def test_one_client_with_all_data_is_a_plain_loop(case: str, home: Path, tmp_path: Path) -> None:
    one = (
        "devices=[{name: whole, count: 1}]",
        "train.local_steps=3",
        "federation.rounds=1",
        "train.lr_schedule=constant",
    )
    recipe = task_recipe(case, tmp_path, *one, "evaluation.max_examples=8", rows=60)
    clear_run_context()
    shop = get_run_context(recipe.model_dump_json())
    clear_run_context()
    order = batches(shop.client_rows[0], 8, 3, derive_seed(0, 1, 0, "order"))
    optimiser = torch.optim.AdamW(shop.model.parameters(), lr=0.02, weight_decay=0.0)
    begun = {name: one.detach().clone() for name, one in shop.model.named_parameters()}
    shop.model.train().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, 1, 0, "dropout"))
        for rows in order:
            shop.task.compute_loss(shop.model, shop.train.make_batch(rows)).backward()
            nn.utils.clip_grad_norm_(shop.model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    execute(recipe, run="one")
    found = checkpoint.read_checkpoint(get_runs_folder() / "one" / "round-0001.safetensors")
    expected = dict(shop.model.named_parameters())
    assert found
    # AdamW divides small gradients by themselves, so their rounding is amplified: all tensors are compared together.
    missed = sum(float((tensor - expected[name].detach()).square().sum()) for name, tensor in found.items())
    moved = sum(float((tensor - begun[name]).square().sum()) for name, tensor in found.items())
    assert missed < 1e-6 * moved


def test_a_task_of_a_package_resumes_and_exports(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install_task(tmp_path, "sorter_runs"))
    recipe = trivial("task=sorting", "train.local_steps=1")
    alone = execute(recipe, run="alone").hashes
    assert stop_and_resume(recipe) == alone
    written = export_run("stopped", tmp_path / "out", None, "model", None)
    assert written.recipe.task.name == "sorting"
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    trained = checkpoint.read_checkpoint(get_runs_folder() / "stopped" / "round-0002.safetensors")
    assert sorted(map(torch.sum, saved.values())) == sorted(map(torch.sum, trained.values()))


@pytest.mark.slow
@pytest.mark.deployed
def test_a_task_of_a_package_is_deployed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    folder = install_task(tmp_path, "sorter_deployed")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    recipe = trivial("task=sorting", "devices=[{count: 2}]")
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1"):
        found = ended(server, submit(server, recipe))
    assert found["status"] == "completed", found["reason"]
    assert statuses(found) == {"merged"}
    assert hashes(found) == execute(recipe, run="simulated").hashes


def install_task(folder: Path, module: str) -> Path:
    """The path of a package with the task ``sorting``."""
    points = {"fedtune.tasks": {"sorting": f"{module}:Sorting"}}
    return install(folder / "sorter", "sorter", points, {module: TASK})
