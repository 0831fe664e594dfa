"""Clients that only score: their figures beside a recomputation, whom a run asks, and who gives none."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, MetricRecord
from flwr.clientapp import ClientApp

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.device.client_app import train_round
from fedtune.device.local_round import run_local_round
from fedtune.errors import ClientUpdateError, FedtuneError
from fedtune.flower import train_messages
from fedtune.recipe.schema import PrivacySettings, Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.seeds import derive_seed
from fedtune.server.bases import Bases
from fedtune.server.client_device import ClientDevice
from fedtune.server.client_scoring import ClientScoring, draw_scorers
from fedtune.server.events import Unscored, describe_unscored_clients
from fedtune.server.reports import read_score
from fedtune.server.run_clients import RunClients
from fedtune.server.scheduling.round_scheduler import DEVICE_REMOVED, NO_REPLY_BEFORE_DEADLINE
from fedtune.server.sending import Sending
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import ProcessPoolWorkers, SequentialWorkers
from fedtune.training import get_model_state, get_run_context, set_model_state
from fedtune.training.holdout_split import split_holdout
from fedtune.wire.client_update import HoldoutMetrics, TrainRequest
from fedtune.wire.error_codes import DECLINED_PREFIX, TRAINING_FAILED
from fedtune.wire.protocol_codes import Problem
from tests.federations import TRIVIAL, Ended, execute, order_of, silent, trivial, words
from tests.local_norms import local_norms
from tests.metric_oracles import count_f1

ALL = ("evaluation={own: 0.2, metrics: [f1], clients: all}", "federation.clients_per_round=1")


def figures(ended: Ended, number: int, moment: str) -> dict[tuple[int, str], float]:
    found = ended.rounds[number].client_scores
    return {(one.client, one.name): one.value for one in found if one.moment == moment}


def test_every_client_scores_the_state_that_the_round_ended_with(home: Path) -> None:
    recipe = trivial(*ALL)
    ended = execute(recipe)
    shop = get_run_context(recipe.model_dump_json())
    for number in (1, 2):
        state = ended.rounds[number].checkpoint
        assert state is not None
        set_model_state(shop.model, checkpoint.read_checkpoint(homes.get_runs_folder() / state.path))
        found = figures(ended, number, "shared")
        assert len(found) == 4 * 3
        for client in range(4):
            _, held = split_holdout(shop.client_rows[client], 0.2, derive_seed(recipe.seed, client, "own"))
            batch = shop.train.make_batch(held.tolist())
            labels = batch.pop("labels")
            logits = shop.model.eval()(**batch).logits.detach()
            predicted = logits.argmax(-1)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            assert found[client, "accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
            assert found[client, "loss"] == pytest.approx(float(loss), abs=1e-5)
            assert found[client, "f1"] == pytest.approx(count_f1(predicted.tolist(), labels.tolist()))
        assert len(figures(ended, number, "after")) == 3, "one client alone trains"


def everyone(folder: Path, kind: str, *overrides: str) -> Recipe:
    """All clients train, with techniques that change what scoring must do."""
    if kind == "local norms":
        return local_norms(folder, *overrides)
    if kind == "pruned":
        return trivial(
            "train.techniques=[dynamic-pruning: {density: 0.2, every: 1, until: 10, share: 0.5}]", *overrides
        )
    return words(folder, f"train.techniques={kind}", *overrides)


@pytest.mark.parametrize("kind", ["local norms", "pruned", "[lora: {trained_factors: alternate}]", "[full, deft]"])
def test_figures_of_a_state_are_those_by_which_its_next_round_begins(home: Path, tmp_path: Path, kind: str) -> None:
    ended = execute(everyone(tmp_path, kind, "evaluation={own: 0.25, clients: all}"), run="scored")
    plain = execute(everyone(tmp_path, kind, "evaluation={own: 0.25}"), run="plain")
    assert ended.hashes == plain.hashes, "who scores changes nothing of what is learned"
    many = {contribution.client for contribution in ended.rounds[1].client_records}
    for number in range(1, len(ended.rounds) - 1):
        shared = figures(ended, number, "shared")
        assert len(shared) == 2 * len(many)
        assert shared == figures(ended, number + 1, "before")
    for scored, unasked in zip(ended.rounds, plain.rounds, strict=True):
        assert [one for one in scored.client_scores if one.moment != "shared"] == list(unasked.client_scores)


@pytest.mark.slow
def test_a_pool_scores_what_clients_in_turn_score(home: Path) -> None:
    in_turn = execute(trivial(*ALL), run="in-turn")
    pool = execute(trivial(*ALL), ProcessPoolWorkers(get_run_context(trivial(*ALL).model_dump_json()), 1), run="pool")
    assert [one.client_scores for one in pool.rounds] == [one.client_scores for one in in_turn.rounds]
    assert pool.hashes == in_turn.hashes


def test_clients_score_after_rounds_that_are_evaluated_and_after_the_last(home: Path) -> None:
    ended = execute(trivial("evaluation={own: 0.2, every: 2, clients: 2}", "federation.rounds=3"))
    scored = [{one.client for one in record.client_scores if one.moment == "shared"} for record in ended.rounds]
    assert [len(clients) for clients in scored] == [0, 0, 2, 2]
    assert scored[2] == scored[3]


def test_the_clients_drawn_are_the_same_as_long_as_they_are_there() -> None:
    recipe = trivial("devices=[{count: 40}]", "evaluation={own: 0.2, clients: 10}")
    first = draw_scorers(recipe, range(40))
    assert first == draw_scorers(recipe, range(40)) == sorted(set(first))
    assert len(first) == 10
    without = draw_scorers(recipe, [client for client in range(40) if client != first[3]])
    assert len(without) == 10
    assert set(first) - set(without) == {first[3]}
    assert draw_scorers(recipe, [3, 1]) == [1, 3]
    assert draw_scorers(recipe.model_copy(update={"seed": 1}), range(40)) != first
    assert draw_scorers(trivial("evaluation={own: 0.2, clients: all}"), [4, 2]) == [2, 4]
    assert draw_scorers(trivial("evaluation={own: 0.2}"), range(4)) == []


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "{clients: all}",
            "clients score on what they hold out, which is nothing; set local_holdout too, e.g. local_holdout: 0.2",
        ),
        ("{own: 0.2, clients: 5}", "evaluation.clients is 5, but devices has only 4"),
        ("{own: 0.2, clients: 0}", "evaluation.clients"),
        ("{own: 0.2, clients: some}", "evaluation.clients"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused(setting: str, sentence: str) -> None:
    with pytest.raises(FedtuneError, match=sentence):
        parse_recipe(TRIVIAL, "trivial", [f"evaluation={setting}"])


def test_an_order_to_train_travels_as_it_did_before(home: Path) -> None:
    seen: list[set[str]] = []
    app = ClientApp()

    @app.train()
    def note(message: Message, context: Context) -> Message:
        seen.append(set(train_messages.read_train_request(message.content)))
        return train_round(message, context)

    execute(trivial(*ALL), app)
    assert [fields - {"recipe", "round", "client", "run_id", "label_names"} for fields in seen] == [
        *[set(), *[{"scoring"}] * 4],
        *[set(), *[{"scoring"}] * 4],
    ]


class Unreliable(InProcessGrid):
    """The node of client 0 is away, that of client 1 is removed at the last moment, and client 2 never answers."""

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node != 2]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        kept = list(messages)
        numbers = super().push_messages([message for message in kept if order_of(message)[1] not in (1, 2)])
        by_client = {client: "" if client == 1 else "lost" for client in (1, 2)}
        waiting = iter(numbers)
        return [by_client.get(order_of(message)[1]) or _number(message, waiting) for message in kept]


def _number(message: Message, numbers: Iterable[str]) -> str:
    return "" if order_of(message)[1] == 1 else next(iter(numbers))


def test_devices_that_are_away_removed_silent_or_decline_cost_nothing_but_their_figures(home: Path) -> None:
    recipe = trivial("evaluation={own: 0.2, clients: all}", "devices=[{count: 6}]", "federation.deadline=1.5")
    shop = get_run_context(recipe.model_dump_json())
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        client = order_of(message)[1]
        if client == 4:
            return Message(Error(TRAINING_FAILED, DECLINED_PREFIX + Problem("memory-short").text), reply_to=message)
        if client == 5:
            shop.client_rows[5] = shop.client_rows[5][:10]
        return train_round(message, context)

    crew = RunClients(
        range(2, 8), [ClientDevice("toy", f"dev-{client}") for client in range(6)], deployed=True, eligible=range(6)
    )
    with silent() as events:
        state = get_model_state(shop.model, shop.shared_names)
        sending = Sending(shop, "run", Bases(shop, home / "runs" / "run", state, []))
        asking = ClientScoring(Unreliable(6, SequentialWorkers(app)), shop, "run", sending)
        found = asking.score_by_clients(crew, state, 1, 0.0)
    assert {one.client for one in found.clients} == {3}
    [told] = [event for event in events if isinstance(event, Unscored)]
    assert told.asked == 5
    assert told.reasons == {
        "client 1 (dev-1)": DEVICE_REMOVED,
        "client 2 (dev-2)": NO_REPLY_BEFORE_DEADLINE,
        "client 4 (dev-4)": "declined: it ran out of memory; details are in the device's own log",
        "client 5 (dev-5)": "it has fewer than 5 held-out examples",
    }
    assert describe_unscored_clients(told).startswith(
        "round 1  4 of 5 clients did not score the shared model: client 1 (dev-1): "
    )


GOOD: dict[str, Any] = {
    "num_examples": 0,
    "loss": math.nan,
    "seconds": 1.0,
    "activation_memory": 0,
    "peak_memory": 9,
}
SCORE: dict[str, Any] = {
    "num_holdout_predictions": 7,
    "holdout_loss": 0.5,
    "holdout_accuracy": 0.25,
    "extra_holdout_metrics": [0.125],
    "trained_holdout_metrics": [],
}


def test_a_score_is_checked_before_it_is_believed() -> None:
    assert read_score(MetricRecord({**GOOD, **SCORE})).holdout_metrics == HoldoutMetrics(7, 0.5, 0.25, (0.125,))
    for wrong in (
        {"num_examples": 1},
        {"holdout_accuracy": 1.5},
        {"holdout_loss": math.inf},
        {"num_holdout_predictions": -1},
    ):
        with pytest.raises(ClientUpdateError, match="update the client"):
            read_score(MetricRecord({**GOOD, **SCORE, **wrong}))
    with pytest.raises(ClientUpdateError, match="carries no report"):
        read_score(None)


def test_with_privacy_no_score_leaves_a_client(home: Path) -> None:
    shop = get_run_context(trivial("evaluation={own: 0.2}").model_dump_json())
    state = get_model_state(shop.model, shop.shared_names)
    order = TrainRequest(shop.recipe.model_dump_json(), 1, 0, "run", scoring=True)
    assert run_local_round(order, state, shop, shop.client_rows[0], home)[1].num_holdout_predictions > 0
    private = replace(
        shop,
        recipe=shop.recipe.model_copy(update={"privacy": PrivacySettings(clipping_norm=1.0, noise_multiplier=1.0)}),
    )
    assert run_local_round(order, state, private, shop.client_rows[0], home)[1].num_holdout_predictions == 0
