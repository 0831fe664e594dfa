"""Which device takes which place."""

import json
from datetime import UTC, datetime

from fedtune.server.assignment import assign_devices
from fedtune.tracking import DeviceRecord
from tests.federations import trivial

MEMORY = {"attic": 300, "bath": 900, "cellar": 200, "den": 900, "extra": 5000}


def devices() -> list[DeviceRecord]:
    begun = datetime.now(UTC)
    return [
        DeviceRecord(
            name=name,
            node_id=str(number),
            public_key="",
            enrolled_at=begun,
            last_seen_at=None,
            profile=json.dumps({"memory": memory} if memory != 200 else {}),
        )
        for number, (name, memory) in enumerate(MEMORY.items())
    ]


def places(*overrides: str) -> list[str]:
    seats = assign_devices(trivial(*overrides), devices())
    assert [seat.client for seat in seats] == list(range(len(seats)))
    assert [seat.node_id for seat in seats] == [str(list(MEMORY).index(seat.device_name)) for seat in seats]
    return [seat.device_name for seat in seats]


def test_devices_take_their_places_by_name() -> None:
    assert places() == ["attic", "bath", "cellar", "den"]


def test_the_most_memory_goes_where_the_most_is_allowed() -> None:
    small, large = "{name: small, count: 2, memory: 64MB, batch: 2}", "{name: large, count: 2, memory: 1GB}"
    assert places(f"devices=[{small}, {large}]") == ["attic", "cellar", "bath", "den"]


def test_a_device_that_tells_no_memory_counts_as_the_smallest() -> None:
    small, large = "{name: small, count: 1, memory: 64MB, batch: 2}", "{name: large, count: 3, memory: 1GB}"
    assert places(f"devices=[{small}, {large}]") == ["cellar", "bath", "den", "attic"]
