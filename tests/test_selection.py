"""Who qualifies, who is asked first, and that a resumed run asks the same clients."""

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Message

from fedtune.errors import RecipeError
from fedtune.recipe.federation import ClientSelection
from fedtune.recipe.schema import Recipe
from fedtune.server.presence import Presence
from fedtune.server.run_manager import RunManager
from fedtune.server.selection import (
    check_enough_eligible_clients,
    check_enough_enrolled_devices,
    is_device_eligible,
    is_eligible,
    list_eligible_clients,
    rank_clients,
    sample_cohort,
)
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import DeviceRecord, Store
from tests.federations import Ended, begin, execute, order_of, outcome, silent, spoilt, trivial

KINDS = """devices=[{name: phone-a, count: 3, memory: 256MB, tags: [indoors]},
{name: phone-b, count: 2, memory: 1GB, tags: [indoors, mains]}, {name: tablet, count: 5, memory: 2GB}]"""


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"devices": ["phone-*"]}, [0, 1, 2, 3, 4]),
        ({"devices": ["phone-b", "tab*"]}, [3, 4, 5, 6, 7, 8, 9]),
        ({"devices": ["PHONE-*"]}, []),
        ({"tags": ["indoors"]}, [0, 1, 2, 3, 4]),
        ({"tags": ["indoors", "mains"]}, [3, 4]),
        ({"memory": "1GB"}, [3, 4, 5, 6, 7, 8, 9]),
        ({"memory": "1GB", "devices": ["phone-?"], "tags": ["mains"]}, [3, 4]),
    ],
)
def test_a_simulation_asks_the_classes_for_which_all_of_it_holds(select: dict[str, Any], expected: list[int]) -> None:
    recipe = trivial(KINDS, f"federation.selection={json.dumps(select)}")
    assert list_eligible_clients(recipe) == expected
    if expected:
        asked = {
            client for number in range(1, 30) for client in sample_cohort(recipe, number, list_eligible_clients(recipe))
        }
        assert asked == set(expected)


def device(name: str, profile: dict[str, Any], *tags: str) -> DeviceRecord:
    moment = datetime.now(UTC)
    text = json.dumps(profile)
    return DeviceRecord(
        name=name, node_id="1", public_key="", enrolled_at=moment, last_seen_at=moment, profile=text, tags=tags
    )


def test_what_a_device_says_of_itself_gives_it_memory_but_no_tags() -> None:
    tagged, large = ClientSelection(tags=["mains"]), ClientSelection.model_validate({"min_memory": "512MB"})
    boasting = device("a", {"memory": 10**12, "tags": ["mains"]})
    assert not is_device_eligible(tagged, boasting)
    assert is_device_eligible(tagged, device("a", {}, "mains", "indoors"))
    assert is_device_eligible(large, boasting)
    assert not is_device_eligible(large, device("a", {"memory": 511_999_999}))
    assert not is_device_eligible(large, device("a", {}))
    assert not is_device_eligible(large, device("a", {"memory": "1GB"}))
    assert is_eligible(ClientSelection(), "anybody", (), 0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["federation.selection.tags=[mains]", "federation.clients_per_round=3"],
            "2 of the 10 clients in devices qualify",
        ),
        (["federation.selection.tags=[mains]", "federation.quorum=3"], "2 of the 10 clients in devices qualify"),
        (["federation.selection.tags=[roof]"], "0 of the 10 clients in devices qualify, but a round needs 1;"),
        (
            ["federation.selection.device_names=[phone-*]", "federation.fraction_train=0.2", "federation.quorum=2"],
            "a round needs 2",
        ),
    ],
)
def test_too_few_qualifying_classes_are_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        check_enough_eligible_clients(trivial(KINDS, *overrides))


def test_a_fraction_is_of_those_that_qualify() -> None:
    recipe = trivial(KINDS, "federation.selection.device_names=[tablet]", "federation.fraction_train=0.4")
    assert {len(sample_cohort(recipe, number, list_eligible_clients(recipe))) for number in range(1, 9)} == {2}


def test_without_a_selection_the_sample_is_what_it_always_was() -> None:
    recipe = trivial("devices=[{count: 10}]", "federation.clients_per_round=4")
    assert [sample_cohort(recipe, number) for number in (1, 2, 3)] == [[3, 5, 6, 7], [0, 1, 8, 9], [5, 6, 7, 8]]


def test_those_that_were_away_longest_come_first_and_ties_are_drawn() -> None:
    recipe = trivial(
        "devices=[{count: 6}]", "federation.clients_per_round=2", "federation.selection.sampling=longest-ago"
    )
    last = {0: 5, 1: 3, 2: 5, 4: 1, 5: 4}
    assert rank_clients(recipe, 6, range(6), last)[:4] == [3, 4, 1, 5]
    assert sample_cohort(recipe, 6, range(6), last) == [3, 4]
    firsts = {rank_clients(recipe, number, range(6), {})[0] for number in range(1, 60)}
    assert firsts == set(range(6))


ROTATING = ["devices=[{count: 5}]", "federation.clients_per_round=2", "federation.rounds=6"]
ROTATING += ["federation.selection.sampling=longest-ago", "train.local_steps=1"]


def clients(ended: Ended) -> list[list[int]]:
    return [[sent.client for sent in record.client_records] for record in ended.rounds[1:]]


def test_a_run_that_prefers_the_longest_away_asks_everybody_equally_often(home: Path) -> None:
    asked = clients(execute(trivial(*ROTATING)))
    for done in range(1, 7):
        counts = Counter(client for some in asked[:done] for client in some)
        assert max(counts.values()) - min(counts[client] for client in range(5)) <= 1


def test_a_stopped_run_asks_the_same_clients_when_it_is_resumed(home: Path) -> None:
    recipe = trivial(*ROTATING)
    whole = execute(recipe, run="whole")
    stops = [4]

    def stop(message: Message, reply: Message) -> Message:
        if order_of(message)[0] in stops:
            stops.clear()
            raise KeyboardInterrupt
        return reply

    app = spoilt(stop, range(5))
    with Store.open() as store, silent():
        run = begin(store, recipe, "stopped")
        with pytest.raises(KeyboardInterrupt):
            run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, run)
        assert len(store.rounds(run)) == 4
        store.reopen(run)
        run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, run)
    assert clients(outcome("stopped")) == clients(whole)
    assert outcome("stopped").hashes == whole.hashes


class Online:
    """A SuperLink that any device is connected to and that starts nothing."""

    start_count = 1

    def get_control_client(self) -> "Online":
        return self

    def is_superexec_alive(self) -> bool:
        return True

    def list_online_nodes(self) -> set[int]:
        return {1, 2, 3, 4, 5, 6}

    def start_run(self, _: dict[str, str]) -> int:
        return 1


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open() as opened:
        for node in range(1, 7):
            tags = ("lab", "mains") if node % 2 else ("lab",)
            opened.access.add_device(name=f"dev-{node}", node_id=str(node), public_key=f"pem {node}", tags=tags)
            opened.access.save_device_profile(f"dev-{node}", json.dumps({"memory": node * 10**8}))
        yield opened


def managed(store: Store, home: Path) -> RunManager:
    presence = Presence(Online().list_online_nodes)
    for device in store.access.list_devices():
        presence.record_contact(device.name)
    return RunManager(store, cast("Any", Online()), presence, home, deadline=77.0)


def selecting(*overrides: str) -> Recipe:
    return trivial("devices=[{count: 2}]", *overrides)


@pytest.mark.parametrize(
    ("select", "seated"),
    [
        ("federation.selection.tags=[mains]", ["dev-1", "dev-3"]),
        ("federation.selection.min_memory=400MB", ["dev-4", "dev-5"]),
        ("federation.selection.device_names=[dev-6, dev-2]", ["dev-2", "dev-6"]),
        ("federation.selection={tags: [mains], memory: 300MB}", ["dev-3", "dev-5"]),
    ],
)
def test_only_qualifying_devices_get_a_seat(store: Store, home: Path, select: str, seated: list[str]) -> None:
    work = managed(store, home)
    run = work.submit_run(selecting(select))
    work.tick()
    assert [seat.device_name for seat in store.access.list_assignments(run)] == seated


def test_a_run_that_too_few_devices_can_serve_is_refused_when_it_is_submitted(store: Store, home: Path) -> None:
    work = managed(store, home)
    with pytest.raises(RecipeError, match="1 of 6 enrolled devices qualify, but devices counts 2; tag or enrol more"):
        work.submit_run(selecting("federation.selection.device_names=[dev-6]"))
    assert store.runs() == []
    store.access.change_device_tags("dev-2", ["mains"], ["lab"])
    devices = {one.name: one.tags for one in store.access.list_devices()}
    assert (devices["dev-1"], devices["dev-2"]) == (("lab", "mains"), ("mains",))
    check_enough_enrolled_devices(
        trivial("devices=[{count: 4}]", "federation.selection.tags=[mains]"), store.access.list_devices()
    )
    check_enough_enrolled_devices(
        trivial("devices=[{count: 99}]"), store.access.list_devices()
    )  # without a selection a run may wait
