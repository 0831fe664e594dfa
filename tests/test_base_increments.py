"""Base weights that absorb what the clients learned go down as increments: the bits stay, the bytes do not."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.device import client_app as apps
from fedtune.device.held_base import leave_others, with_base
from fedtune.device.problems import problem_of
from fedtune.errors import DeviceError, StoreError
from fedtune.flower import train_messages
from fedtune.merging import split_increments
from fedtune.recipe.schema import Recipe
from fedtune.server import round_merge
from fedtune.server.events import event_handler
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import RoundRecord, Store
from fedtune.tracking.rollback import rollback_run
from fedtune.training import clear_run_context, get_run_context, set_model_state
from fedtune.wire.client_update import TrainRequest, decode_tensors, pack
from fedtune.wire.protocol_codes import LACKS_BASE
from tests.federations import Ended, begin, execute, order_of, outcome, silent, tiny_bert, words
from tests.test_adapters_federation import Halted, halt_after
from tests.test_adapters_rounds import EXACT
from tests.ticking import TickingGrid, seat

Sent = dict[tuple[int, int], list[Message]]
Happens = Callable[[int, int], None]


def recipe(folder: Path, step: str, *overrides: str) -> Recipe:
    """Three clients of a BERT whose base is many times its pairs."""
    made = words(
        folder, "train.techniques=[{lora: {trained_factors: both-and-base, rank: 1}}]", f"merge=[{step}]", *overrides
    )
    tiny_bert(folder / "bert", width=64)
    return made


def nothing(number: int, client: int) -> None:
    """No device is harmed."""


def devices(sent: Sent, happens: Happens = nothing) -> ClientApp:
    """Real ClientApps that keep their errors; ``happens`` comes before each order.

    A device builds the model when it is first asked; here one process is all devices.
    """
    app, known = ClientApp(), {client for _, client in sent}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent.setdefault(order_of(message), []).append(message)
        if order_of(message)[1] not in known:
            known.add(order_of(message)[1])
            clear_run_context()
        if len(sent[order_of(message)]) == 1:
            happens(*order_of(message))
        return apps.train_round_and_keep_errors(message, context)

    return app


def deployed(
    made: Recipe,
    sent: Sent,
    happens: Happens = nothing,
    run: str = "deployed",
) -> Ended:
    with Store.open() as store, silent():
        if run not in {one.id for one in store.runs()}:
            seat(store, begin(store, made, run), made.num_clients)
        run_to_completion(grid_of(made, sent, happens), store, run)
    return outcome(run)


def grid_of(made: Recipe, sent: Sent, happens: Happens = nothing) -> TickingGrid:
    return TickingGrid(made.num_clients, devices(sent, happens), lambda client, number: 1.0)


def sizes(rounds: Sequence[RoundRecord]) -> list[dict[int, int]]:
    return [{one.client: one.bytes_down for one in record.client_records} for record in rounds[1:]]


def whole(message: Message) -> bool:
    return any(
        ".base_layer." in name
        for name in decode_tensors(train_messages.read_shared_state(message.content))
        if "increments/" not in name
    )


def wholes(sent: Sent) -> set[tuple[int, int]]:
    """Round and client of the orders that held the whole base."""
    return {order for order, messages in sent.items() if any(whole(message) for message in messages)}


def own(client: int, run: str = "deployed") -> list[Path]:
    return sorted((homes.get_runs_folder() / run / "own" / f"client-{client:06d}").glob("base-*.safetensors"))


def dense(ended: Ended, number: int) -> int:
    """Bytes of the state that a round began with, whole."""
    saved = ended.rounds[number - 1].checkpoint
    assert saved is not None
    return len(pack(checkpoint.read_checkpoint(homes.get_runs_folder() / saved.path)))


@pytest.mark.parametrize("step", EXACT)
def test_devices_are_sent_increments_and_end_with_the_bits_of_a_simulation(
    home: Path, tmp_path: Path, step: str
) -> None:
    made, sent = recipe(tmp_path, step, "federation.rounds=4", "checkpoints.keep=all"), Sent()
    simulated = execute(made, run="simulated")
    real = deployed(made, sent)
    assert real.hashes == simulated.hashes
    assert {one.status for record in real.rounds for one in record.client_records} == {"merged"}
    assert wholes(sent) == set()
    assert sizes(real.rounds) == sizes(simulated.rounds)
    assert sizes(real.rounds)[2] == {
        client: len(train_messages.read_shared_state(sent[3, client][0].content)) for client in range(3)
    }
    assert max(sizes(real.rounds)[2].values()) < dense(real, 3) / 5
    assert [len(own(client)) for client in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("step", EXACT)
def test_the_base_on_a_device_has_the_bits_of_the_server(home: Path, tmp_path: Path, step: str) -> None:
    made, sent = recipe(tmp_path, step, "federation.rounds=3", "checkpoints.keep=all"), Sent()
    real = deployed(made, sent)
    for number in (2, 3):
        saved = real.rounds[number - 1].checkpoint
        assert saved is not None
        state = checkpoint.read_checkpoint(homes.get_runs_folder() / saved.path)
        path = next(path for path in own(0) if checkpoint.hash_tensors(_base(state)) in path.name)
        kept = checkpoint.read_checkpoint(path)
        assert all(torch.equal(kept[name], state[name]) for name in kept)
        assert kept.keys() == _base(state).keys()


def _base(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if ".base_layer." in name}


def _lose(path: Path) -> None:
    path.unlink()


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("harm", [_lose, _damage, _cut])
def test_a_device_without_its_base_is_sent_it_whole_in_the_same_round(
    home: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    made, sent = recipe(tmp_path, "flora", "federation.rounds=4", "checkpoints.keep=all"), Sent()
    alone = execute(made, run="simulated")

    def happens(number: int, client: int) -> None:
        if (number, client) == (3, 1):
            for path in own(1):
                harm(path)

    real = deployed(made, sent, happens)
    assert real.hashes == alone.hashes
    assert wholes(sent) == {(3, 1)}
    assert [whole(message) for message in sent[3, 1]] == [False, True]
    usual = sizes(alone.rounds)
    assert sizes(real.rounds)[2] == {**usual[2], 1: usual[2][1] + dense(real, 3)}
    assert sizes(real.rounds)[3] == usual[3]


def test_a_device_that_always_lacks_its_base_is_asked_twice_and_no_more(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = apps.train_round

    def train(message: Message, context: Context) -> Message:
        if order_of(message)[1] == 1:
            raise DeviceError("it is gone", code=LACKS_BASE)
        return real(message, context)

    monkeypatch.setattr(apps, "train_round", train)
    made, sent = recipe(tmp_path, "flora", "federation.quorum=2"), Sent()
    ended = deployed(made, sent)
    assert {order: len(messages) for order, messages in sent.items()} == {
        (number, client): 2 if client == 1 else 1 for number in (1, 2) for client in range(3)
    }
    told = [one for record in ended.rounds for one in record.client_records if one.client == 1]
    assert [one.status for one in told] == ["error", "error"]
    assert all(one.reason.startswith("it lacks base weights that its train request is based on") for one in told)


@pytest.mark.parametrize("keep", ["all", "{last: 1, best: false, every: null}"])
def test_a_device_that_was_not_asked_for_rounds_is_sent_all_it_missed(home: Path, tmp_path: Path, keep: str) -> None:
    some = ("federation.fraction_train=0.34", "federation.quorum=1", "federation.rounds=7", f"checkpoints.keep={keep}")
    made, sent = recipe(tmp_path, "flora", *some), Sent()
    simulated = execute(made, run="simulated")
    real = deployed(made, sent)
    assert real.hashes == simulated.hashes
    assert wholes(sent) == set()
    missed = [
        len(split_increments(decode_tensors(train_messages.read_shared_state(messages[0].content)))[1])
        for messages in sent.values()
    ]
    assert max(missed) > 1
    assert sizes(real.rounds) == sizes(simulated.rounds)


def test_increments_that_would_be_more_than_the_base_are_not_kept_and_not_sent(home: Path, tmp_path: Path) -> None:
    """Rank 16 of three clients in layers 16 wide: each round's increments are as large as the base."""
    wide = "train.techniques=[{lora: {trained_factors: both-and-base, rank: 16}}]"
    made, sent = words(tmp_path, wide, "merge=[flora]", "federation.rounds=3"), Sent()
    simulated = execute(made, run="simulated")
    real = deployed(made, sent)
    assert real.hashes == simulated.hashes
    assert wholes(sent) == {(number, client) for number in (2, 3) for client in range(3)}
    assert sizes(real.rounds) == sizes(simulated.rounds)
    assert len(list((homes.get_runs_folder() / "deployed").glob("increments-*"))) == 1


@pytest.mark.parametrize("way", ["simulated", "deployed"])
def test_a_halted_run_goes_on_with_the_same_bits_and_bytes(home: Path, tmp_path: Path, way: str) -> None:
    made, sent = recipe(tmp_path, "flora", "federation.rounds=4"), Sent()
    alone = execute(made, run="alone")
    with Store.open() as store:
        begin(store, made, "halted")
        if way == "deployed":
            seat(store, "halted", made.num_clients)
        token = event_handler.set(halt_after(2))
        with pytest.raises(Halted):
            run_to_completion(_grid(made, sent, way), store, "halted")
        event_handler.reset(token)
        clear_run_context()
        with silent():
            run_to_completion(_grid(made, sent, way), store, "halted")
    assert outcome("halted").hashes == alone.hashes
    assert sizes(outcome("halted").rounds) == sizes(alone.rounds)
    assert wholes(sent) == set()


def _grid(made: Recipe, sent: Sent, way: str) -> InProcessGrid:
    if way == "deployed":
        return grid_of(made, sent)
    return InProcessGrid(made.num_clients, SequentialWorkers(apps.app))


class Apart(InProcessGrid):
    """Clients that do not see the server's files, as on Flower's own engine."""

    shares_disk = False


def test_a_simulation_whose_clients_see_no_disk_counts_increments_and_sends_the_state(
    home: Path, tmp_path: Path
) -> None:
    made, sent = recipe(tmp_path, "flora"), Sent()
    alone = execute(made, run="simulated")
    with Store.open() as store, silent():
        run_to_completion(Apart(made.num_clients, SequentialWorkers(devices(sent))), store, begin(store, made, "apart"))
    assert outcome("apart").hashes == alone.hashes
    assert sizes(outcome("apart").rounds) == sizes(alone.rounds)
    assert wholes(sent) == set(sent)
    assert own(0, "apart") == []


def test_a_round_that_is_begun_again_finds_the_base_it_counts_on(home: Path, tmp_path: Path) -> None:
    """As after the server was killed with all answers sent: the devices hold the base of the round already."""
    made, sent = recipe(tmp_path, "flora", "federation.rounds=3"), Sent()
    alone = execute(made, run="simulated")
    with Store.open() as store, silent(), pytest.MonkeyPatch.context() as patch:
        seat(store, begin(store, made, "deployed"), made.num_clients)
        patch.setattr(round_merge, "_merge", _killed_in(2))
        with pytest.raises(Halted):
            run_to_completion(grid_of(made, sent), store, "deployed")
    clear_run_context()
    assert len(sent[2, 0]) == 1
    assert deployed(made, sent).hashes == alone.hashes
    assert [whole(message) for message in sent[2, 0]] == [False, False]


def _killed_in(number: int) -> Callable[..., object]:
    real = round_merge._merge

    def merged(run: object, state: object, now: int, contributions: object) -> object:
        if now == number:
            raise Halted
        return real(run, state, now, contributions)  # type: ignore[arg-type]

    return merged


def test_a_run_that_was_rolled_back_goes_on_and_devices_that_are_ahead_get_the_base(home: Path, tmp_path: Path) -> None:
    made, sent = recipe(tmp_path, "flora", "federation.rounds=4", "checkpoints.keep=all"), Sent()
    first = deployed(made, sent).hashes
    with Store.open() as store:
        assert rollback_run(store, "deployed", 2) == 2
    sent.clear()
    assert deployed(made, sent).hashes == first
    assert wholes(sent) == {(3, client) for client in range(3)}
    assert sorted(path.name for path in (homes.get_runs_folder() / "deployed").glob("increments-*")) == [
        f"increments-{number:04d}.safetensors" for number in range(1, 5)
    ]


def test_a_device_class_in_another_precision_asks_for_the_base_at_first(home: Path, tmp_path: Path) -> None:
    classes = "devices=[{name: a, count: 2}, {name: b, count: 1, dtype: bfloat16}]"
    made, sent = recipe(tmp_path, "flora", classes, "federation.rounds=3"), Sent()
    assert deployed(made, sent).hashes == execute(made, run="simulated").hashes
    assert wholes(sent) == {(1, 2)}


def test_the_model_as_it_was_built_is_no_base_once_it_has_trained(home: Path, tmp_path: Path) -> None:
    made, sent = recipe(tmp_path, "flora", "federation.rounds=2", "checkpoints.keep=all"), Sent()
    deployed(made, sent)
    message = sent[2, 0][0]
    order = TrainRequest(**train_messages.read_train_request(message.content))  # type: ignore[arg-type]
    shop = get_run_context(order.recipe)
    state = decode_tensors(train_messages.read_shared_state(message.content))
    folder = tmp_path / "anew"
    found = with_base(order, state, shop, folder)
    assert checkpoint.hash_tensors(_base(found)) == order.base_digest
    set_model_state(shop.model, found)
    with pytest.raises(DeviceError, match="not on this device") as caught:
        with_base(order, state, shop, tmp_path / "another")
    assert problem_of(caught.value).text == LACKS_BASE


def test_a_full_disk_costs_the_device_the_next_orders_increments_only(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sent = recipe(tmp_path, "flora", "federation.rounds=3"), Sent()
    alone = execute(made, run="simulated")
    monkeypatch.setattr(
        "fedtune.device.held_base.checkpoint.write_checkpoint", _full_in_own(checkpoint.write_checkpoint)
    )
    assert deployed(made, sent).hashes == alone.hashes
    lacking = {(number, client) for number in (2, 3) for client in (1, 2)}
    assert wholes(sent) == lacking, "the first one's model still holds the base; here all devices share one model"
    assert own(0) == []


def _full_in_own(save: Callable[[Path, Mapping[str, torch.Tensor]], str]) -> object:
    def checked(path: Path, state: Mapping[str, torch.Tensor]) -> str:
        if path.name.startswith("base-"):
            raise StoreError("cannot write: no space left on device")
        return save(path, state)

    return checked


def test_only_the_bases_of_the_run_in_hand_stay_on_a_device(tmp_path: Path) -> None:
    for run in ("one", "two"):
        checkpoint.write_checkpoint(tmp_path / run / "base-abc.safetensors", {"w": torch.zeros(1)})
        checkpoint.write_checkpoint(tmp_path / run / "round-0001.safetensors", {"w": torch.zeros(1)})
    leave_others(tmp_path / "two")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert left == ["one/round-0001.safetensors", "two/base-abc.safetensors", "two/round-0001.safetensors"]
