"""AIM in a federation: who measures, what clients send, and that runs stay runs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.data.sampling import iter_inputs
from fedtune.device.client_app import app
from fedtune.errors import RecipeError
from fedtune.merging import MergeContext, build_pipeline, find_input_channels, measure_activation_statistics
from fedtune.recipe.schema import Recipe
from fedtune.server import round_merge
from fedtune.server.merge_context import make_merge_context
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import ProcessPoolWorkers, SequentialWorkers
from fedtune.techniques import begin_round, list_trainable_tensors
from fedtune.tracking import Store, claim_run
from fedtune.training import (
    ClientRound,
    RunContext,
    clear_run_context,
    get_model_state,
    get_run_context,
    set_model_state,
    train_local_model,
)
from fedtune.training.uploaded_statistics import declare_uploaded_statistics
from fedtune.wire.client_update import ClientUpdate, decode_tensors, pack
from tests.federations import Ended, execute, outcome, silent, spoilt, words
from tests.test_resume import bits
from tests.test_rounds import REPORT, answer, payload_of

SERVER = "merge=[mean, {aim: {omega: 0.4, statistics: server}}]"
CLIENTS = "merge=[mean, {aim: {omega: 0.4, statistics: clients}}]"
ALL = "merge=[mean, {aim: {omega: 0.4, statistics: clients, examples: null}}]"
FULL = "train.techniques=full"


def shop_of(recipe: Recipe) -> RunContext:
    clear_run_context()
    return get_run_context(recipe.model_dump_json())


def states(ended: Ended) -> list[Mapping[str, Tensor]]:
    found = [record.checkpoint for record in ended.rounds]
    return [
        checkpoint.read_checkpoint(homes.get_runs_folder() / one.path, one.sha256) for one in found if one is not None
    ]


def sent_by(shop: RunContext, folder: Path, number: int = 1) -> tuple[Mapping[str, Tensor], list[ClientUpdate]]:
    """What all clients of a round send, as files, beside the state the round starts from."""
    state, sent = get_model_state(shop.model, shop.shared_names), []
    for client, indices in enumerate(shop.client_rows):
        got = train_local_model(
            ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, indices, number, client), state
        )
        path = folder / f"{client}.safetensors"
        path.write_bytes(pack({**got.delta, **got.extra_payload}))
        sent.append(ClientUpdate(client, got.num_examples, path))
    return state, sent


def test_what_clients_sum_is_the_statistic_of_their_pooled_examples(home: Path, tmp_path: Path) -> None:
    shop = shop_of(words(tmp_path, FULL, ALL))
    state, sent = sent_by(shop, tmp_path)
    pipeline = build_pipeline(shop.recipe.merge)
    found = make_merge_context(shop, pipeline, state, 1, shop.shared_names, sent).activation_statistics
    set_model_state(shop.model, state)
    pooled = np.concatenate(shop.client_rows).tolist()
    wanted = measure_activation_statistics(shop.model, iter_inputs(shop.train, pooled, 7))
    assert found.keys() == wanted.keys() == find_input_channels(shop.model).keys()
    for name in wanted:
        torch.testing.assert_close(found[name].mean_abs, wanted[name].mean_abs, rtol=1e-5, atol=1e-8)


def test_the_order_in_which_clients_arrive_does_not_touch_a_bit(home: Path, tmp_path: Path) -> None:
    shop = shop_of(words(tmp_path, FULL, CLIENTS))
    state, sent = sent_by(shop, tmp_path)
    pipeline = build_pipeline(shop.recipe.merge)
    one, other = (
        make_merge_context(shop, pipeline, state, 1, shop.shared_names, some).activation_statistics
        for some in (sent, sent[::-1])
    )
    assert all(torch.equal(one[name].mean_abs, other[name].mean_abs) for name in one)


def test_the_server_measures_validation_inputs_on_the_model_the_round_began_with(home: Path, tmp_path: Path) -> None:
    shop = shop_of(words(tmp_path, FULL, SERVER))
    state, sent = sent_by(shop, tmp_path)  # the model now holds what the last client trained
    found = make_merge_context(
        shop, build_pipeline(shop.recipe.merge), state, 1, shop.shared_names, sent
    ).activation_statistics
    set_model_state(shop.model, state)
    wanted = measure_activation_statistics(shop.model, iter_inputs(shop.validation, range(len(shop.validation)), 64))
    assert all(torch.equal(found[name].mean_abs, wanted[name].mean_abs) for name in wanted)


@pytest.mark.parametrize("merge", [SERVER, CLIENTS], ids=["server", "clients"])
def test_a_round_ends_where_a_plain_mean_scaled_by_hand_ends(home: Path, tmp_path: Path, merge: str) -> None:
    clear_run_context()
    plain, aim = (
        states(execute(words(tmp_path, FULL, "federation.rounds=1", one), run=run))
        for run, one in (("plain", "merge=[mean]"), ("aim", merge))
    )
    shop = shop_of(words(tmp_path, FULL, "federation.rounds=1", merge))
    state, sent = sent_by(shop, tmp_path)
    found = make_merge_context(
        shop, build_pipeline(shop.recipe.merge), state, 1, shop.shared_names, sent
    ).activation_statistics
    assert all(torch.equal(plain[0][name], aim[0][name]) for name in state)
    for name, before in state.items():
        scale = torch.ones(())
        if name in found:
            level = found[name].mean_abs
            scale = 1 - 0.6 * level / level.max()
        torch.testing.assert_close(aim[1][name], (before + (plain[1][name] - before) * scale).float())
    moved = {name for name in state if not torch.equal(plain[1][name], aim[1][name])}
    assert moved <= found.keys()
    assert len(moved) > 10


@pytest.mark.parametrize("where", ["server", "clients"])
def test_omega_one_is_bit_equal_to_the_plain_merge(home: Path, tmp_path: Path, where: str) -> None:
    clear_run_context()
    plain = execute(words(tmp_path, FULL), run="plain")
    one = f"merge=[mean, {{aim: {{omega: 1.0, statistics: {where}}}}}]"
    assert execute(words(tmp_path, FULL, one), run="aim").hashes == plain.hashes


@pytest.mark.parametrize("merge", [SERVER, CLIENTS], ids=["server", "clients"])
def test_a_run_that_stops_midway_and_is_resumed_ends_with_the_same_bits(
    home: Path, tmp_path: Path, merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = words(tmp_path, merge, "federation.rounds=4")
    clear_run_context()
    expected = bits(execute(recipe, run="alone"))

    def unplugged(*given: object) -> MergeContext:
        if given[3] == 3:
            raise OSError("the plug was pulled")
        return make_merge_context(*given)  # type: ignore[arg-type]

    clear_run_context()
    monkeypatch.setattr(round_merge, "make_merge_context", unplugged)
    with pytest.raises(OSError, match="plug"):
        execute(recipe, run="stopped")
    monkeypatch.undo()
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    assert len(outcome("stopped").rounds) == 3
    assert bits(resumed("stopped", recipe)) == expected


def resumed(run: str, recipe: Recipe) -> Ended:
    """As a new process would: everything is built again."""
    clear_run_context()
    crew = SequentialWorkers(app)
    with Store.open() as store, claim_run(run), silent():
        store.reopen(run)
        run_to_completion(InProcessGrid(recipe.num_clients, crew), store, run)
    return outcome(run)


@pytest.mark.slow
def test_a_pool_ends_in_the_same_weights_as_clients_in_turn(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, FULL, CLIENTS)
    in_turn = execute(recipe, run="in-turn")
    pool = execute(recipe, ProcessPoolWorkers(shop_of(recipe), 1), run="pool")
    assert in_turn.hashes == pool.hashes
    assert len(set(pool.hashes)) == 3


def test_clients_send_sums_only_for_weights_that_are_trained_in_the_round(home: Path, tmp_path: Path) -> None:
    shop = shop_of(words(tmp_path, CLIENTS))
    names = {}
    for number in (1, 2):
        begin_round(shop.techniques, shop.model, number)
        asked = declare_uploaded_statistics(shop.model, shop.recipe, list_trainable_tensors(shop.model))
        names[number] = set(find_input_channels(shop.model, set(list_trainable_tensors(shop.model))))
        assert asked["activity.counts"].shape == (len(names[number]),)
    assert names[1] == {"classifier.weight"}  # B and the head
    assert names[2] == {"classifier.weight", *(name for name in shop.shared_names if ".lora_A." in name)}
    assert not declare_uploaded_statistics(shop.model, shop_of(words(tmp_path, SERVER)).recipe, shop.shared_names)


def test_the_bytes_added_are_one_number_per_input_channel_and_a_count_per_weight(home: Path, tmp_path: Path) -> None:
    sizes = {}
    for name, merge in (("plain", "merge=[mean]"), ("aim", CLIENTS)):
        shop = shop_of(words(tmp_path, FULL, merge))
        _, [first, *_] = sent_by(shop, tmp_path)
        sizes[name] = first.path.stat().st_size
    places = find_input_channels(shop.model).values()
    added = sizes["aim"] - sizes["plain"]
    assert added == pytest.approx(4 * (sum(place.size for place in places) + len(places)), abs=300)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda sent: {n: t for n, t in sent.items() if n != "activity.sums"}, "missing ['activity.sums']"),
        (lambda sent: {**sent, "activity.sums": sent["activity.sums"] * float("nan")}, "not finite"),
        (lambda sent: {**sent, "activity.counts": sent["activity.counts"][1:]}, "activity.counts has shape"),
    ],
    ids=["missing", "not a number", "short"],
)
def test_a_client_whose_sums_do_not_hold_is_refused(
    home: Path, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str
) -> None:
    clear_run_context()
    bad = spoilt(lambda message, reply: answer(message, pack(spoil(decode_tensors(payload_of(reply)))), REPORT), {1})
    ended = execute(words(tmp_path, FULL, CLIENTS, "federation.rounds=1"), bad)
    told = {record.client: record for record in ended.rounds[1].client_records}
    assert {client: record.status for client, record in told.items()} == {0: "merged", 1: "rejected", 2: "merged"}
    assert reason in told[1].reason


@pytest.mark.parametrize("techniques", ["full", "lora"])
def test_client_sums_do_not_change_what_is_trained(home: Path, tmp_path: Path, techniques: str) -> None:
    sent: dict[str, dict[str, Tensor]] = {}
    for merge in ("merge=[mean]", CLIENTS):
        folder = tmp_path / str(len(sent))
        folder.mkdir()
        shop = shop_of(words(folder, f"train.techniques={techniques}", merge))
        _, [first, *_] = sent_by(shop, folder, number=2)
        sent[merge] = first.read_tensors(list_trainable_tensors(shop.model))
    plain, aim = sent.values()
    assert all(torch.equal(plain[name], aim[name]) for name in plain)


def test_a_federation_whose_weights_are_masked_is_refused_before_it_starts(home: Path, tmp_path: Path) -> None:
    pruning = "train.techniques=[{dynamic-pruning: {density: 0.9, extrusion: null}}]"
    with pytest.raises(RecipeError, match=r"masked weights .*; drop one$"):
        shop_of(words(tmp_path, SERVER, pruning))
