"""A device whose updates are refused again and again is asked no more until an operator releases it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from fedtune.errors import StoreError
from fedtune.recipe.schema import ClientSelection, Recipe
from fedtune.server.quarantine import REFUSALS, Quarantine
from fedtune.server.replies import read_error
from fedtune.server.selection import is_device_eligible
from fedtune.server.server_app import run_to_completion
from fedtune.tracking import Store
from fedtune.wire.error_codes import REFUSED, TRAINING_FAILED
from tests.federations import Ended, Spoil, begin, outcome, silent, spoilt, trivial
from tests.test_norm_bound import HUGE
from tests.ticking import TickingGrid, seat


def enrolled(store: Store, count: int = 4) -> None:
    for client in range(count):
        store.access.add_device(name=f"dev-{client}", node_id=str(client + 2), public_key=f"key-{client}")


def deployed(store: Store, recipe: Recipe, client: ClientApp, run: str = "run-1") -> Ended:
    with silent():
        seat(store, begin(store, recipe, run, engine="devices"), recipe.num_clients)
        run_to_completion(TickingGrid(recipe.num_clients, client, lambda *_: 1.0), store, run)
    return outcome(run)


def asked(ended: Ended) -> list[list[int]]:
    return [[sent.client for sent in record.client_records] for record in ended.rounds[1:]]


@pytest.mark.parametrize("late", [[], ["federation.asynchronous={buffer: 3}"]])
def test_after_repeated_refusals_a_device_is_quarantined_and_asked_no_more(home: Path, late: list[str]) -> None:
    with Store.open() as store:
        enrolled(store)
        ended = deployed(store, trivial("federation.rounds=6", "train.local_steps=1", *late), spoilt(HUGE, {1}))
        found = store.access.find_device("dev-1")
    assert ended.run.status == "completed"
    times = [number for number, clients in enumerate(asked(ended), 1) if 1 in clients]
    assert len(times) == REFUSALS
    assert found is not None
    assert found.quarantine_reason is not None
    assert found.quarantine_reason.startswith("3 rejected in a row: its values are")
    assert not is_device_eligible(ClientSelection(), found)


def test_an_update_that_counts_ends_the_row(home: Path) -> None:
    with Store.open() as store:
        enrolled(store)
        recipe = trivial("federation.rounds=6", "train.local_steps=1")
        ended = deployed(store, recipe, spoilt(HUGE, {1}, rounds={1, 2, 4, 5}))
        assert not any(device.quarantine_reason for device in store.access.list_devices())
    assert all(len(clients) == 4 for clients in asked(ended))


def test_errors_and_silence_are_no_fault_of_this_kind(home: Path) -> None:
    def fail(message: Message, reply: Message) -> Message:
        raise ValueError("the battery is empty")

    with Store.open() as store:
        enrolled(store)
        deployed(store, trivial("federation.rounds=5", "train.local_steps=1"), spoilt(fail, {1}))
        assert not any(device.quarantine_reason for device in store.access.list_devices())


def test_a_run_that_quarantine_leaves_too_few_for_waits_and_says_whom_to_look_after(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No round is burnt, and the run goes on once an operator has released the device."""
    recipe = trivial("federation.rounds=5", "train.local_steps=1", "federation.quorum=4")
    said: list[str] = []
    with Store.open() as store:
        enrolled(store)

        def release(seconds: float) -> None:
            said.append(store.run("run-1").reason)
            assert store.access.release_device("dev-1")
            assert not store.access.release_device("dev-1")

        monkeypatch.setattr("fedtune.server.roster.time", SimpleNamespace(sleep=release))
        ended = deployed(store, recipe, spoilt(HUGE, {1}, rounds={1, 2, 3}))
    assert [record.status for record in ended.rounds[1:]] == ["failed"] * REFUSALS + ["completed"] * 2
    assert len(said) == 1
    assert said[0].startswith("waits: dev-1 is quarantined, and too few devices are left for federation.quorum 4")
    assert "fedtune server release dev-1" in said[0]


def test_a_released_device_is_on_probation_until_an_update_counts(home: Path) -> None:
    with Store.open() as store:
        enrolled(store)
        first = deployed(store, trivial("federation.rounds=3", "train.local_steps=1"), spoilt(HUGE, {1}))
        store.access.release_device("dev-1")
        again = Quarantine(store.access, "run-1", first.rounds)
        assert not store.access.list_devices()[1].quarantine_reason
        again.judge(first.rounds[-1].client_records)
        assert store.access.list_devices()[1].quarantine_reason


def test_a_device_that_is_not_enrolled_cannot_be_released(home: Path) -> None:
    with Store.open() as store, pytest.raises(StoreError, match="there is no device 'nobody'"):
        store.access.release_device("nobody")


def answer_with(code: int) -> Spoil:
    """A reply that the guarded grid replaced by an error, as it does where a reply breaks the protocol."""

    def answer(message: Message, reply: Message) -> Message:
        return Message(Error(code, "[it] confirmed\x1b its train request before it fetched it"), reply_to=message)

    return answer


def test_a_reply_that_the_grid_refused_is_a_rejected_one_whose_reason_is_cleaned() -> None:
    for code, status in ((REFUSED, "rejected"), (TRAINING_FAILED, "error")):
        found, reason = read_error(Error(code, "it said\x1b[31m so\u202e"))
        assert (found, reason.isprintable()) == (status, True)


@pytest.mark.parametrize(("code", "asked_for"), [(REFUSED, REFUSALS), (TRAINING_FAILED, 5)])
def test_what_the_grid_refuses_counts_for_the_quarantine_and_an_error_does_not(
    home: Path, code: int, asked_for: int
) -> None:
    with Store.open() as store:
        enrolled(store)
        recipe = trivial("federation.rounds=5", "train.local_steps=1")
        ended = deployed(store, recipe, spoilt(answer_with(code), {1}))
        quarantined = [one.name for one in store.access.list_devices() if one.quarantine_reason]
    assert sum(1 in clients for clients in asked(ended)) == asked_for
    assert quarantined == (["dev-1"] if code == REFUSED else [])
