"""One recipe, one result: clients in turn, in a pool of processes, or on Flower's own engine."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.device.client_app import train_round
from fedtune.errors import RunError
from fedtune.recipe.schema import Recipe
from fedtune.simulation import workers
from fedtune.simulation.flower_engine import run_on_flower_engine
from fedtune.simulation.workers import ProcessPoolWorkers
from fedtune.tracking import Store, get_default_url
from fedtune.training import RunContext, get_run_context
from tests.federations import TRIVIAL, begin, execute, order_of, outcome, silent, tiny_bert, trivial, words

RAY = importlib.util.find_spec("ray") is not None


def shop(recipe: Recipe) -> RunContext:
    return get_run_context(recipe.model_dump_json())


@pytest.mark.slow
def test_a_pool_ends_in_the_same_weights_and_metrics_as_clients_in_turn(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path)
    in_turn = execute(recipe, run="in-turn")
    pool = execute(recipe, ProcessPoolWorkers(shop(recipe), 2), run="pool")
    assert in_turn.hashes == pool.hashes
    assert len(set(pool.hashes)) == 3
    assert [record.metrics for record in in_turn.rounds] == [record.metrics for record in pool.rounds]
    assert {found.status for record in pool.rounds for found in record.client_records} == {"merged"}


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="Flower's engine needs ray, which is not installed: pip install 'fedtune[ray]'")
def test_flowers_own_engine_ends_in_the_same_weights(home: Path) -> None:
    recipe = trivial()
    in_turn = execute(recipe, run="in-turn")
    with Store.open() as store:
        begin(store, recipe, "flower", engine="flower")
    with silent():
        run_on_flower_engine(recipe, "flower", get_default_url())
    flower = outcome("flower")
    assert flower.run.status == "completed"
    assert flower.hashes == in_turn.hashes


_JOIN = "import ray, sys; ray.init(address=sys.argv[1]); print(ray.get(ray.remote(lambda: 'joined').remote()))"
_BEGIN = """
import os, subprocess, sys
from fedtune.simulation.flower_engine import _ray_with_a_secret

def joins(environment):
    try:
        command = [sys.executable, "-c", sys.argv[1], address]
        return "joined" in subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout
    except subprocess.TimeoutExpired:
        return False

with _ray_with_a_secret():
    import ray  # reads its environment now

    address = ray.init(include_dashboard=False, num_cpus=1, logging_level="ERROR").address_info["gcs_address"]
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    print("own", joins(dict(os.environ)), "stranger", joins(stranger))
    ray.shutdown()
"""


@pytest.mark.deployed
@pytest.mark.skipif(not RAY, reason="Flower's engine needs ray, which is not installed: pip install 'fedtune[ray]'")
def test_ray_takes_work_only_from_those_who_know_the_runs_secret() -> None:
    done = subprocess.run([sys.executable, "-c", _BEGIN, _JOIN], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["own", "True", "stranger", "False"], done.stderr


fatal = ClientApp()
"""Its process is killed while it trains client 1 in round 1."""


@fatal.train()
def _train(message: Message, context: Context) -> Message:
    if order_of(message) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_round(message, context)


@pytest.mark.slow
def test_a_killed_worker_costs_what_it_was_doing_and_the_pool_recovers(home: Path) -> None:
    recipe = trivial()
    ended = execute(recipe, ProcessPoolWorkers(shop(recipe), 2, fatal))
    first, second = ended.rounds[1:]
    lost = [found for found in first.client_records if found.status == "error"]
    assert 1 in {found.client for found in lost}
    assert {found.reason for found in lost} == {
        "code 2: RuntimeError('a worker process was killed, perhaps for want of memory')"
    }
    assert [found.status for found in second.client_records] == ["merged"] * 4
    assert ended.run.status == "completed"
    assert not _workers()


def _workers() -> list[psutil.Process]:
    """Worker processes of this one; multiprocessing's own resource tracker is none."""
    return [found for found in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(found.cmdline())]


@pytest.mark.slow
def test_worker_processes_end_when_their_parent_is_killed(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TRIVIAL.replace("rounds: 2", "rounds: 100000"), encoding="utf-8")
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(recipe), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 2/"):
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.slow
def test_ctrl_c_ends_a_pool_at_once_with_one_word(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TRIVIAL.replace("rounds: 2", "rounds: 100000"), encoding="utf-8")
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(recipe), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 1/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        asked = time.monotonic()
        lines = process.stderr.read().splitlines()
    said = [line for line in lines if line and not line.startswith("round ")]
    assert (process.returncode, said) == (130, ["stopped"])
    assert time.monotonic() - asked < 20
    assert outcome().run.status == "interrupted"


def test_workers_that_would_share_more_tensors_than_they_may_open_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.simulation.workers.raise_file_limit", lambda: 257)
    with pytest.raises(RunError, match=r"2 tensors.*the limit of open files is 257; .*--workers 1"):
        ProcessPoolWorkers(shop(trivial()), 2)


@pytest.mark.slow
def test_workers_share_more_tensors_than_a_starting_process_can_be_given_files(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=[lora]", "federation.rounds=1")
    tiny_bert(tmp_path / "bert", layers=20)
    context = shop(recipe)
    assert context.count_tensors() > forkserver.MAXFDS_TO_SEND
    in_turn = execute(recipe, run="in-turn")
    pool = execute(recipe, ProcessPoolWorkers(context, 2), run="pool")
    assert pool.run.status == "completed"
    assert in_turn.hashes == pool.hashes


def test_a_broken_pool_is_left_to_its_own_thread_before_its_queue_is_closed() -> None:
    """Two threads that closed the queue at once raised 'Bad file descriptor' in one of them."""
    order: list[str] = []
    reader = SimpleNamespace(close=lambda: order.append("closed"))

    def end() -> None:
        time.sleep(0.1)
        order.append("ended by its thread")

    thread = threading.Thread(target=end)
    executor: Any = SimpleNamespace(
        _call_queue=SimpleNamespace(_reader=reader), _executor_manager_thread=thread, _broken="killed"
    )
    thread.start()
    workers._let_go_of_half_written_messages(executor)
    assert order == ["ended by its thread", "closed"]
