"""Build a device from its home folder and the options of ``fedtune device join``, and run it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.device.device_home import DeviceHome
from fedtune.device.device_profile import make_device_profile
from fedtune.device.enrolment import describe_expiry
from fedtune.device.node import DeviceNode
from fedtune.device.server_client import fetch_server_time, make_tls_context, send_profile
from fedtune.device.server_clock import ServerClock
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import DataError
from fedtune.flower.fleet_client import FleetClient, make_signed_headers

__all__ = ["FILES", "check_data_source", "run_device"]

FILES = ("csv", "jsonl", "parquet", "folder")
"""Kinds of sources that name a path."""
_KINDS = "csv:FILE, jsonl:FILE, parquet:FILE, folder:PATH, sample:NAME or partition:NUMBER"


def check_data_source(source: str) -> None:
    """Raise DataError if the trainer cannot read the value of ``--data``. This is checked before the trainer starts."""
    kind, _, name = source.partition(":")
    if kind not in (*FILES, "sample", "partition") or not name:
        raise DataError(f"--data is {source!r}; write {_KINDS}")
    if kind in FILES and not Path(name).expanduser().exists():
        raise DataError(f"there is no {name}, which --data names; check the path")
    if kind == "partition" and not name.isdecimal():
        raise DataError(f"--data is {source!r}; partitions are numbered: partition:0, partition:1, ...")


def run_device(home: DeviceHome, source: str, budget: int, idle: float, say: Callable[[str], None]) -> None:
    """Run the device until it is interrupted; ``budget`` is in bytes, ``idle`` in seconds.

    Raise DeviceError if it is not enrolled, if its key is damaged, or if another process runs it already.
    """
    check_data_source(source)
    identity, key = home.read_identity(), home.read_key()
    trust = make_tls_context(identity.ca)
    clock = ServerClock(partial(fetch_server_time, identity.url, trust))

    def tell(holding: Mapping[str, Any] | None) -> None:
        headers = make_signed_headers(key, clock.get_server_time())
        send_profile(identity.url, trust, headers, make_device_profile(budget, dict(holding) if holding else None))

    address = identity.url.removeprefix("https://")
    with home.hold_lock():
        fleet = FleetClient(address, identity.ca, key, identity.node, clock.get_server_time)
        if sentence := describe_expiry(identity, clock.get_server_time()):
            say(sentence)
        try:
            DeviceNode(home, fleet, TrainerSupervisor(source, budget, idle), clock, tell, say).run()
        finally:
            fleet.close()
