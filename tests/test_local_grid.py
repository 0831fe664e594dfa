"""The in-process grid keeps Flower's contract: stock strategies and apps run on it as they are."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedtune.flower.message_identity import set_message_id, set_node_identity
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers


def a_message(node: int, word: str = "") -> Message:
    return Message(RecordDict({"order": ConfigRecord({"word": word})}), node, "train")


def word_of(message: Message) -> Any:
    return message.content.config_records["order"]["word"]


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if word_of(message) == "raise":
            raise ValueError("no such word")
        return Message(message.content, reply_to=message)

    return app


def pull_all(grid: InProcessGrid, numbers: list[str]) -> list[Message]:
    arrived: list[Message] = []
    while len(arrived) < len(numbers):
        arrived += grid.pull_messages(numbers)
    return arrived


def test_a_process_without_identity_cannot_make_a_message_until_it_is_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="not set"):
        a_message(3)
    set_node_identity(7, run=5)
    message = a_message(3)
    assert (message.metadata.run_id, message.metadata.src_node_id, message.metadata.dst_node_id) == (5, 7, 3)


def test_a_reply_refers_to_the_number_its_message_was_given() -> None:
    set_node_identity(1)
    message = a_message(3)
    assert set_message_id(message, "42") == message.metadata.message_id == "42"
    reply = Message(RecordDict(), reply_to=message)
    assert (reply.metadata.reply_to_message_id, reply.metadata.dst_node_id) == ("42", 1)


def test_each_node_gets_its_message_and_its_answer_is_known_by_number() -> None:
    grid = InProcessGrid(3, SequentialWorkers(echo()))
    nodes = list(grid.get_node_ids())
    numbers = grid.push_messages([a_message(node, f"to {node}") for node in nodes])
    replies = pull_all(grid, numbers)
    assert len(set(numbers)) == 3
    assert {reply.metadata.reply_to_message_id: word_of(reply) for reply in replies} == {
        number: f"to {node}" for number, node in zip(numbers, nodes, strict=True)
    }


def test_answers_that_are_not_asked_for_yet_are_kept() -> None:
    grid = InProcessGrid(2, SequentialWorkers(echo()))
    first, second = grid.push_messages([a_message(2, "first"), a_message(3, "second")])
    assert [word_of(reply) for reply in pull_all(grid, [second])] == ["second"]
    assert [word_of(reply) for reply in pull_all(grid, [first])] == ["first"]
    assert grid.pull_messages([first, second]) == []


def test_a_client_app_that_raises_gives_an_error_reply_with_code_and_text() -> None:
    grid = InProcessGrid(2, SequentialWorkers(echo()))
    bad, good = grid.push_messages([a_message(2, "raise"), a_message(3, "fine")])
    replies = {reply.metadata.reply_to_message_id: reply for reply in pull_all(grid, [bad, good])}
    assert (replies[bad].error.code, replies[bad].error.reason) == (2, "ValueError('no such word')")
    assert not replies[good].has_error()


def test_messages_of_an_earlier_exchange_are_dropped() -> None:
    grid = InProcessGrid(2, SequentialWorkers(echo()))
    old = grid.push_messages([a_message(2, "old"), a_message(3, "old")])
    assert len(grid.pull_messages(old)) == 1
    new = grid.push_messages([a_message(2, "new")])
    assert [word_of(reply) for reply in pull_all(grid, new)] == ["new"]
    assert grid.pull_messages([*old, *new]) == []


def test_sending_and_receiving_stops_when_time_is_up() -> None:
    class Deaf(SequentialWorkers):
        def submit(self, number: str, message: Message, context: Context) -> None:
            if word_of(message) != "lost":
                super().submit(number, message, context)

    grid = InProcessGrid(2, Deaf(echo()))
    started = time.monotonic()
    replies = grid.send_and_receive([a_message(2, "lost"), a_message(3, "heard")], timeout=0.3)
    assert [word_of(reply) for reply in replies] == ["heard"]
    assert 0.3 <= time.monotonic() - started < 3


def stock_client() -> ClientApp:
    """Adds its partition number plus one to every weight, and counts its calls in its own state."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = context.state.config_records.setdefault("calls", ConfigRecord({"count": 0}))
        count, partition = calls["count"], context.node_config["partition-id"]
        assert isinstance(count, int)
        assert isinstance(partition, int)
        calls["count"] = count + 1
        [weights] = message.content.array_records["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": partition + 1, "calls": count + 1})
        arrays = ArrayRecord([weights + partition + 1])
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def test_a_stock_strategy_runs_unmodified_and_nodes_keep_their_state(tmp_path: Path) -> None:
    results: list[Any] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        results.append(strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=2))

    server(InProcessGrid(3, SequentialWorkers(stock_client())), Context(1, 1, {}, RecordDict(), {}))
    [weights] = results[0].arrays.to_numpy_ndarrays()
    step = (1 * 1 + 2 * 2 + 3 * 3) / (1 + 2 + 3)
    np.testing.assert_allclose(weights, np.full(2, 2 * step))
    calls = {number: metrics["calls"] for number, metrics in results[0].train_metrics_clientapp.items()}
    assert calls == pytest.approx({1: 1, 2: 2})
