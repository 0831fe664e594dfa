import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedtune.device.local_round import read_payload, run_local_round
from fedtune.device.trainer_channel import Frame, TrainerChannel
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.training import clear_run_context, get_model_state, get_run_context
from fedtune.wire.client_update import TrainRequest, decode_tensors, pack
from fedtune.wire.masked_weights import encode_masked_state
from tests.federations import trivial

PLENTY = 4_000_000_000


@pytest.fixture
def order(home: Path) -> Frame:
    recipe = trivial().model_dump_json()
    shop = get_run_context(recipe)
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    return Frame({"recipe": recipe, "round": 1, "client": 2, "run_id": "run", "label_names": "[]"}, payload)


@pytest.fixture
def keepers() -> Iterator[list[TrainerSupervisor]]:
    made: list[TrainerSupervisor] = []
    yield made
    for keeper in made:
        keeper.stop_trainer()


def _keeper(
    keepers: list[TrainerSupervisor], source: str = "partition:2", budget: int = PLENTY, idle: float = 60.0
) -> TrainerSupervisor:
    keepers.append(TrainerSupervisor(source, budget, idle))
    return keepers[-1]


def test_a_trainer_answers_with_the_bits_of_a_simulated_client_and_stays(
    order: Frame, keepers: list[TrainerSupervisor], home: Path
) -> None:
    keeper = _keeper(keepers)
    first = keeper.run_request(order)
    trainer = keeper.pid
    second = keeper.run_request(order)
    clear_run_context()
    shop = get_run_context(order.header["recipe"])
    deltas, report = run_local_round(
        TrainRequest(**order.header), read_payload(order.payload, shop, 2), shop, shop.client_rows[2], home / "own"
    )
    assert first.payload == second.payload == deltas
    assert first.header["report"]["loss"] == report.loss
    assert first.header["holding"]["examples"] == len(shop.client_rows[2])
    assert sum(first.header["holding"]["labels"].values()) == len(shop.client_rows[2])
    assert keeper.pid == trainer is not None


def test_a_device_trains_on_its_own_file_with_the_server_s_labels(
    order: Frame, keepers: list[TrainerSupervisor], tmp_path: Path
) -> None:
    answer = _keeper(keepers, "sample:digits").run_request(
        Frame({**order.header, "label_names": _digits()}, order.payload)
    )
    assert answer.header["kind"] == "trained", answer.header
    assert answer.header["holding"]["examples"] > 1000
    assert set(answer.header["holding"]["labels"]) == {str(digit) for digit in range(10)}


def test_a_file_with_a_label_the_model_does_not_know_fails(order: Frame, keepers: list[TrainerSupervisor]) -> None:
    answer = _keeper(keepers, "sample:digits").run_request(
        Frame({**order.header, "label_names": '["0", "1"]'}, order.payload)
    )
    assert answer.header["kind"] == "failed"
    assert "does not know the label" in answer.header["detail"]
    assert answer.header["problem"].startswith("unknown-labels rows=")


def test_a_budget_that_cannot_hold_the_settings_declines_before_training(
    order: Frame, keepers: list[TrainerSupervisor]
) -> None:
    keeper = _keeper(keepers, budget=100_000_000)
    keeper._started()
    keeper._budget = PLENTY  # so that the trainer itself must tell, and is not ended from outside
    answer = keeper.run_request(order)
    assert answer.header["kind"] == "declined"
    assert "this device allows 100 MB" in answer.header["detail"]
    assert "allowed_mb=100" in answer.header["problem"]
    assert answer.payload == b""


def test_a_trainer_that_may_not_even_hold_the_model_declines(order: Frame, keepers: list[TrainerSupervisor]) -> None:
    keeper = _keeper(keepers, budget=20_000_000)
    for _ in range(2):
        declined = keeper.run_request(order)
        assert declined.header == {
            "kind": "declined",
            "problem": "memory-model allowed_mb=20",
            "detail": "holding model and data takes more than the 20 MB this device allows",
        }
        assert keeper.pid is None


def test_a_trainer_that_holds_too_much_while_it_trains_is_ended_and_asked_no_more(
    order: Frame, keepers: list[TrainerSupervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, real = _keeper(keepers), TrainerSupervisor._received

    def excessive(self: TrainerSupervisor, channel: TrainerChannel, held: psutil.Process) -> Frame:
        answer = real(self, channel, held)
        if answer.header["kind"] == "trained":
            raise MemoryError
        return answer

    monkeypatch.setattr(TrainerSupervisor, "_received", excessive)
    died = keeper.run_request(order)
    assert (died.header["kind"], died.header["problem"]) == ("died", "memory-training allowed_mb=4000")
    assert keeper._halvings == 4
    assert keeper.run_request(order).header == {**died.header, "kind": "declined"}


def test_a_trainer_begun_again_for_want_of_memory_takes_half_the_examples_at_a_time(
    order: Frame, keepers: list[TrainerSupervisor]
) -> None:
    whole, halved = _keeper(keepers), _keeper(keepers)
    halved._recipe, halved._halvings = order.header["recipe"], 1
    one, other = whole.run_request(order), halved.run_request(order)
    assert "micro_batch_size" not in one.header["report"]
    assert other.header["report"]["micro_batch_size"] == 5
    assert one.header["report"]["num_examples"] == other.header["report"]["num_examples"]
    for name, delta in decode_tensors(one.payload).items():
        torch.testing.assert_close(decode_tensors(other.payload)[name], delta, rtol=1e-4, atol=1e-6)


def test_a_killed_trainer_is_replaced_and_gives_the_same_answer(order: Frame, keepers: list[TrainerSupervisor]) -> None:
    keeper = _keeper(keepers)
    expected = keeper.run_request(order).payload
    before = keeper.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert keeper.run_request(order).payload == expected
    assert keeper.pid != before


def test_a_trainer_killed_again_and_again_is_an_answer_that_says_so(
    order: Frame, keepers: list[TrainerSupervisor]
) -> None:
    keeper, over = _keeper(keepers), threading.Event()
    killer = threading.Thread(target=_kill_each, args=(keeper, over))
    killer.start()
    try:
        answer = keeper.run_request(order)
    finally:
        over.set()
        killer.join()
    assert answer.header["kind"] == "died"
    assert "killed by signal 9, 2 times" in answer.header["detail"]


def test_a_resting_trainer_ends_after_its_time(order: Frame, keepers: list[TrainerSupervisor]) -> None:
    keeper = _keeper(keepers, idle=0.2)
    keeper.run_request(order)
    keeper.stop_if_idle()
    assert keeper.pid is not None
    time.sleep(0.3)
    keeper.stop_if_idle()
    assert keeper.pid is None


def test_a_trainer_does_not_outlive_the_process_that_keeps_it(home: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        keeper = TrainerSupervisor("partition:0", PLENTY, 60.0)
        keeper._started()
        os.write(writing, str(keeper.pid).encode())
        time.sleep(1.0)
        os._exit(0)
    trainer = int(os.read(reading, 32))
    os.close(reading)
    os.close(writing)
    assert psutil.pid_exists(trainer)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end = time.monotonic() + 30
    while psutil.pid_exists(trainer) and psutil.Process(trainer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the trainer lives on"
        time.sleep(0.05)


def _digits() -> str:
    return "[" + ", ".join(f'"{digit}"' for digit in range(10)) + "]"


def _kill_each(keeper: TrainerSupervisor, over: threading.Event) -> None:
    """Kill whatever trainer there is, as soon as it is there."""
    while not over.wait(0.05):
        if (trainer := keeper.pid) is not None:
            try:
                os.kill(trainer, signal.SIGKILL)
            except ProcessLookupError:
                continue
