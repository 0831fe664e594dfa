"""Which devices are there, by a clock of the test's own."""

from pathlib import Path

import pytest

from fedtune.server.presence import Presence
from fedtune.tracking import DeviceRecord, Store


@pytest.fixture
def devices(home: Path) -> list[DeviceRecord]:
    with Store.open() as store:
        for node in (1, 2, 3):
            store.access.add_device(name=f"dev-{node}", node_id=str(node), public_key=f"pem {node}")
        return store.access.list_devices()


def test_a_device_is_there_when_flower_says_so_and_it_was_heard_of_late(devices: list[DeviceRecord]) -> None:
    now = [1000.0]
    presence = Presence(lambda: {1, 2}, lambda: now[0])
    assert presence.list_connected_devices(devices) == [], "none was heard yet"
    for name in ("dev-1", "dev-3"):
        presence.record_contact(name)
    now[0] += 44
    presence.record_contact("dev-2")
    assert [one.name for one in presence.list_connected_devices(devices)] == ["dev-1", "dev-2"], (
        "Flower does not know node 3"
    )
    now[0] += 2
    assert [one.name for one in presence.list_connected_devices(devices)] == ["dev-2"], "dev-1 missed three beats"
    presence.record_contact("dev-1")
    assert [one.name for one in presence.list_connected_devices(devices)] == ["dev-1", "dev-2"]
