"""What every client scored before and after it trained: beside a recomputation from what travelled, and its spread."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flwr.app import Message
from PIL import Image

from fedtune.cli.runs import runs
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.tracking import ClientScore, RoundRecord, Store
from fedtune.tracking.client_spread import compute_spreads
from fedtune.training import get_run_context, get_tensor_shapes, set_model_state
from fedtune.training.holdout_split import split_holdout
from fedtune.wire.client_update import decode_tensors
from fedtune.wire.masked_weights import decode_masked_state
from tests.federations import Ended, execute, order_of, sent_state, spoilt, trivial
from tests.metric_oracles import count_f1
from tests.store_examples import a_round, fill, start

OWN = "evaluation={own: 0.2, metrics: [f1]}"


def noted(recipe: Recipe) -> tuple[Ended, dict[tuple[int, int], tuple[bytes, bytes]]]:
    """A run, and what was sent to and from each client in each round."""
    sent: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def note(message: Message, reply: Message) -> Message:
        sent[order_of(message)] = sent_state(message), bytes(reply.content.array_records["delta"]["safetensors"].data)
        return reply

    return execute(recipe, spoilt(note, range(recipe.num_clients))), sent


def test_scores_are_those_of_the_model_as_it_came_and_as_the_client_trained_it(home: Path) -> None:
    recipe = trivial(OWN)
    ended, sent = noted(recipe)
    shop = get_run_context(recipe.model_dump_json())
    for record in ended.rounds[1:]:
        found = {(one.client, one.moment, one.name): one for one in record.client_scores}
        assert len(found) == 4 * 2 * 3
        for client in range(4):
            down, up = sent[record.number, client]
            state = decode_masked_state(decode_tensors(down), get_tensor_shapes(shop.model))
            trained = {name: state[name] + delta for name, delta in decode_tensors(up).items()}
            _, held = split_holdout(shop.client_rows[client], 0.2, derive_seed(recipe.seed, client, "own"))
            batch = shop.train.make_batch(held.tolist())
            labels = batch.pop("labels")
            for moment, weights in (("before", state), ("after", trained)):
                set_model_state(shop.model, weights)
                logits = shop.model.eval()(**batch).logits.detach()
                right = (logits.argmax(-1) == labels).double().mean()
                assert found[client, moment, "accuracy"].value == pytest.approx(float(right))
                assert found[client, moment, "loss"].value == pytest.approx(
                    float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-5
                )
                assert found[client, moment, "f1"].value == pytest.approx(
                    count_f1(logits.argmax(-1).tolist(), labels.tolist())
                )
                assert found[client, moment, "loss"].num_predictions == len(held)


def test_scoring_changes_no_bit_of_what_is_learned(home: Path) -> None:
    plain = execute(trivial("evaluation={own: 0.2}"), run="plain")
    assert execute(trivial(OWN), run="scored").hashes == plain.hashes


def test_without_examples_held_out_no_client_is_scored(home: Path) -> None:
    assert all(record.client_scores == () for record in execute(trivial()).rounds)


def a_score(client: int, value: float, moment: str = "after", name: str = "accuracy") -> ClientScore:
    return ClientScore(client=client, moment=moment, name=name, value=value, num_predictions=9)


def scored(number: int, values: list[float], **of: str) -> RoundRecord:
    return a_round(number, client_scores=tuple(a_score(client, value, **of) for client, value in enumerate(values)))


def test_the_spread_is_over_clients_and_the_worst_tenth_is_the_low_end() -> None:
    values = np.random.default_rng(0).random(25).tolist()
    [one] = compute_spreads([scored(3, values)])
    assert (one.round, one.moment, one.name, one.clients) == (3, "after", "accuracy", 25)
    assert one.mean == pytest.approx(np.mean(values))
    assert one.deviation == pytest.approx(np.std(values))
    assert one.worst_tenth == pytest.approx(np.mean(sorted(values)[:3]))


def test_the_worst_tenth_of_losses_is_the_high_end_and_what_is_no_number_does_not_count() -> None:
    values = [float(value) for value in range(20)]
    [one] = compute_spreads([scored(1, [*values, math.nan], moment="before", name="loss")])
    assert (one.clients, one.worst_tenth) == (20, 18.5)


def kept(*moments: str) -> list[RoundRecord]:
    """Two rounds after which twelve clients scored, in the store."""
    rounds = [a_round(0)]
    for number in (1, 2):
        scores = [
            a_score(client, 0.5 + client / 100 + number / 10, moment) for client in range(12) for moment in moments
        ]
        rounds.append(a_round(number, client_scores=tuple(scores)))
    with Store.open() as store:
        start(store)
        for record in rounds:
            store.commit_round("film-1a2b", record)
    return rounds


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RoundRecord]:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    return kept("after", "before")


def test_scores_come_back_from_the_store_and_leave_with_their_run(recorded: list[RoundRecord]) -> None:
    with Store.open() as store:
        assert store.rounds("film-1a2b") == recorded
        store.delete("film-1a2b")
        fill(store)
        assert all(record.client_scores == () for record in store.rounds("film-1a2b"))


def test_show_and_export_tell_the_spread_and_each_client(recorded: list[RoundRecord], tmp_path: Path) -> None:
    printed = CliRunner().invoke(runs, ["show", "latest"], catch_exceptions=False).output
    line = next(line for line in printed.splitlines() if "before training" in line)
    assert line.split() == ["accuracy", "before", "training", "12", "0.7550", "0.0345", "0.7050"]
    shown = json.loads(CliRunner().invoke(runs, ["show", "latest", "--json"], catch_exceptions=False).output)
    assert [(one["round"], one["moment"]) for one in shown["clients"]] == [
        (n, m) for n in (1, 2) for m in ("before", "after")
    ]
    assert len(shown["rounds"][1]["client_scores"]) == 24
    CliRunner().invoke(runs, ["export", "latest", "-o", str(tmp_path / "out")], catch_exceptions=False)
    rows = (tmp_path / "out" / "client_scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 48
    assert rows[0] == '"run_id","round","client","moment","name","value","num_predictions","device_type"'


def test_the_picture_has_a_row_more_where_clients_scored(recorded: list[RoundRecord], tmp_path: Path) -> None:
    CliRunner().invoke(runs, ["plot", "latest", "-o", str(tmp_path / "with.png")], catch_exceptions=False)
    with Store.open() as store:
        store.delete("film-1a2b")
        fill(store)
    CliRunner().invoke(runs, ["plot", "latest", "-o", str(tmp_path / "without.png")], catch_exceptions=False)
    with Image.open(tmp_path / "with.png") as more, Image.open(tmp_path / "without.png") as less:
        assert more.width == less.width
        assert more.height > 1.3 * less.height


def test_the_shared_model_has_a_line_and_a_panel_of_its_own(recorded: list[RoundRecord], tmp_path: Path) -> None:
    CliRunner().invoke(runs, ["plot", "latest", "-o", str(tmp_path / "two.png")], catch_exceptions=False)
    with Store.open() as store:
        store.delete("film-1a2b")
    kept("after", "before", "shared")
    printed = CliRunner().invoke(runs, ["show", "latest"], catch_exceptions=False).output
    lines = [line.split() for line in printed.splitlines() if line.startswith("accuracy ")]
    assert [line[1:3] for line in lines] == [["before", "training"], ["after", "training"], ["shared", "model"]]
    assert lines[2][3:] == ["12", "0.7550", "0.0345", "0.7050"]
    CliRunner().invoke(runs, ["plot", "latest", "-o", str(tmp_path / "three.png")], catch_exceptions=False)
    with Image.open(tmp_path / "three.png") as three, Image.open(tmp_path / "two.png") as two:
        assert three.height > 1.2 * two.height
