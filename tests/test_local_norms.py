"""FedBN: batch norms that stay on devices, in federations that run on, are killed, or are worked by a pool."""

import importlib.util
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from flwr.app import Message
from torch import Tensor

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.cli.main import cli
from fedtune.device import local_state
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import RecipeError
from fedtune.server.federated_evaluation import average_holdout_metrics
from fedtune.simulation.flower_engine import run_on_flower_engine
from fedtune.simulation.workers import ProcessPoolWorkers
from fedtune.tasks import get_task
from fedtune.techniques import list_local_tensors
from fedtune.tracking import Store, get_default_url
from fedtune.training import get_model_state, get_run_context
from fedtune.wire.client_update import ClientUpdate, HoldoutMetrics, TrainRequest, decode_tensors, pack
from fedtune.wire.masked_weights import encode_masked_state
from tests.federations import Ended, begin, execute, order_of, outcome, sent_state, silent, spoilt
from tests.kills import start
from tests.local_norms import local_norms, text

RAY = importlib.util.find_spec("ray") is not None


def kept(run: str, client: int) -> dict[str, Tensor]:
    return local_state.load_local_state(homes.get_runs_folder() / run / "own" / f"client-{client:06d}", 99)


def everything(run: str) -> dict[str, str]:
    """Digests of what each client of a run keeps, by file."""
    files = sorted((homes.get_runs_folder() / run / "own").rglob("*"))
    return {
        str(file.relative_to(homes.get_runs_folder() / run)): checkpoint.hash_tensors(checkpoint.read_checkpoint(file))
        for file in files
        if file.is_file()
    }


def figures(ended: Ended) -> list[tuple[int, str, str, float]]:
    return [(record.number, m.split, m.name, m.value) for record in ended.rounds for m in record.metrics]


def test_no_norm_travels_and_clients_share_the_body_but_not_the_norms(home: Path, tmp_path: Path) -> None:
    recipe = local_norms(tmp_path)
    shop = get_run_context(recipe.model_dump_json())
    names, begun = list_local_tensors(shop.model), get_model_state(shop.model, list_local_tensors(shop.model))
    assert len(names) == 4 * 20, "weight, bias, mean and variance of each of ResNet-18's norms"
    sent: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def note(message: Message, reply: Message) -> Message:
        down = sent_state(message)
        sent[order_of(message)] = bytes(down), bytes(reply.content.array_records["delta"]["safetensors"].data)
        return reply

    ended = execute(recipe, spoilt(note, range(3)))
    for down, up in sent.values():
        assert decode_tensors(down).keys() == decode_tensors(up).keys() == set(shop.shared_names)
        assert not set(names) & decode_tensors(down).keys()
    for number in (1, 2, 3):
        assert len({sent[number, client][0] for client in range(3)}) == 1
    for name in names:
        values = [begun[name], *(kept(ended.run.id, client)[name] for client in range(3))]
        assert not any(torch.equal(a, b) for place, a in enumerate(values) for b in values[:place]), name


def test_only_clients_score_a_model_whose_norms_they_keep(home: Path, tmp_path: Path) -> None:
    ended = execute(local_norms(tmp_path))
    assert [(number, part, name) for number, part, name, _ in figures(ended) if part != "updates"] == [
        (number, "local", name) for number in (1, 2, 3) for name in ("accuracy", "loss")
    ]


def test_a_round_starts_from_the_norms_of_the_round_before(home: Path, tmp_path: Path) -> None:
    whole = execute(local_norms(tmp_path), run="whole")
    folder = homes.get_runs_folder() / "whole" / "own" / "client-000000"
    assert [path.name for path in sorted(folder.iterdir())] == ["round-0002.safetensors", "round-0003.safetensors"]

    def forget(message: Message, reply: Message) -> Message:
        for path in (homes.get_runs_folder() / "forgetful" / "own" / "client-000000").iterdir():
            path.unlink()
        return reply

    forgetful = execute(local_norms(tmp_path), spoilt(forget, {0}), run="forgetful")
    assert forgetful.hashes[:2] == whole.hashes[:2]
    assert forgetful.hashes[2] != whole.hashes[2]


def test_a_pool_of_processes_ends_in_the_bits_of_one(home: Path, tmp_path: Path) -> None:
    recipe = local_norms(tmp_path, "federation.rounds=2")
    alone = execute(recipe, run="alone")
    pooled = execute(recipe, ProcessPoolWorkers(get_run_context(recipe.model_dump_json()), 2), run="pooled")
    assert pooled.hashes == alone.hashes
    assert figures(pooled) == figures(alone)
    assert everything("pooled") == everything("alone")


@pytest.mark.parametrize("plant", ["before the rename", "before the commit"])
def test_a_killed_and_resumed_run_keeps_what_an_undisturbed_one_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text(tmp_path))
    found = []
    for home, steps in (("alone", [""]), ("killed", [plant, "resume"])):
        for step in steps:
            argv = ["--resume", "latest"] if step == "resume" else [str(recipe)]
            process = start(tmp_path / home, "simulate", *argv, "--json", plant=step if step == plant else "")
            process.join()
            assert process.exitcode == (-signal.SIGKILL if step == plant else 0), (
                tmp_path / home / "printed"
            ).read_text()
        monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / home))
        ended = outcome()
        assert not list((homes.get_runs_folder() / ended.run.id).rglob(".*.part"))
        found.append((ended.hashes, figures(ended), everything(ended.run.id)))
    assert found[0] == found[1]
    assert len(found[0][2]) == 6


def test_a_device_goes_on_with_the_norms_of_its_run_and_of_no_other(home: Path, tmp_path: Path) -> None:
    recipe = local_norms(tmp_path).model_dump_json()
    shop = get_run_context(recipe)
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    rounds = [("one", 1), ("one", 2), ("two", 2), ("one", 2)]
    orders = [TrainRequest(recipe, number, 1, run) for run, number in rounds]
    keeper = TrainerSupervisor("partition:1", 4_000_000_000, 60.0)
    try:
        answers = [keeper.run_request(Frame(asdict(order), payload)) for order in orders]
    finally:
        keeper.stop_trainer()
    assert [answer.header["kind"] for answer in answers] == ["trained"] * 4, [answer.header for answer in answers]
    simulated = [
        run_local_round(
            order, read_payload(payload, shop, order.client), shop, shop.client_rows[1], home / order.run_id
        )[0]
        for order in orders
    ]
    assert [answer.payload for answer in answers] == simulated
    assert simulated[1] == simulated[3] != simulated[2]


@pytest.mark.deployed  # a third start of Ray takes the other tests half a minute
@pytest.mark.skipif(not RAY, reason="Flower's engine needs ray, which is not installed: pip install 'fedtune[ray]'")
def test_flowers_own_engine_keeps_the_same_norms(home: Path, tmp_path: Path) -> None:
    recipe = local_norms(tmp_path, "federation.rounds=2")
    alone = execute(recipe, run="alone")
    with Store.open() as store:
        begin(store, recipe, "flower", engine="flower")
    with silent():
        run_on_flower_engine(recipe, "flower", get_default_url())
    assert outcome("flower").hashes == alone.hashes
    assert everything("flower") == everything("alone")


def test_what_a_device_keeps_is_of_the_two_latest_rounds_and_read_from_an_earlier_one(tmp_path: Path) -> None:
    for number in (1, 9, 10000):
        local_state.save_local_state(tmp_path, number, {"n": torch.tensor(float(number))})
    assert local_state.load_local_state(tmp_path, 10001)["n"] == 10000
    assert local_state.load_local_state(tmp_path, 10000)["n"] == 9
    assert local_state.load_local_state(tmp_path, 9) == {} == local_state.load_local_state(tmp_path / "none", 5)
    assert len(list(tmp_path.iterdir())) == 2


TASK = get_task("image-classification")


def test_scores_of_clients_are_weighed_by_predictions(tmp_path: Path) -> None:
    told = [HoldoutMetrics(3, 1.0, 0.0), HoldoutMetrics(), HoldoutMetrics(1, 3.0, 1.0)]
    got = average_holdout_metrics([ClientUpdate(client, 5, tmp_path, score) for client, score in enumerate(told)], TASK)
    assert {(m.split, m.domain, m.name): m.value for m in got} == {
        ("local", "all", "accuracy"): 0.25,
        ("local", "all", "loss"): 1.5,
    }
    assert average_holdout_metrics([ClientUpdate(0, 5, tmp_path)], TASK) == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.local_holdout=0", "clients must hold examples out"),
        ("merge=[rebasin, mean]", "rebasin needs a whole model"),
    ],
)
def test_what_needs_a_whole_model_on_the_server_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        local_norms(tmp_path, override)


def test_commands_say_what_such_a_run_is_not(home: Path, tmp_path: Path) -> None:
    execute(local_norms(tmp_path, "federation.rounds=1"))
    exported = CliRunner().invoke(cli, ["export", "latest", "-o", str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.output
    assert "The batch-norm layers have their values from before training" in exported.output
    assert (
        "The batch-norm layers have their values from before training" in (tmp_path / "out" / "README.md").read_text()
    )
    refused = CliRunner().invoke(cli, ["evaluate", "latest"])
    assert "keeps some tensors of its model on the devices" in str(refused.exception)
    shown = CliRunner().invoke(cli, ["runs", "show", "latest"])
    assert "local accuracy" in shown.output
