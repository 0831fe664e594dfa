"""Build a device from its home folder and the options of ``fedtune device join``, and run it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.device.device_home import DeviceHome
from fedtune.device.device_profile import make_device_profile
from fedtune.device.enrolment import describe_expiry
from fedtune.device.node import DeviceNode
from fedtune.device.server_client import fetch_server_time, make_tls_context, send_profile
from fedtune.device.server_clock import ServerClock
from fedtune.device.trainer_limit import choose_trainer_limit
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import DataError
from fedtune.flower.fleet_client import FleetClient, make_signed_headers

__all__ = ["FILES", "TrainerSettings", "check_data_source", "run_device"]

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


class TrainerSettings(NamedTuple):
    """What ``fedtune device join`` says of the trainer: its examples, its memory in bytes, and its idle seconds.

    ``limit`` is ``auto``, ``cgroup`` or ``process``.
    """

    source: str
    budget: int
    idle: float
    limit: str = "auto"


def run_device(home: DeviceHome, settings: TrainerSettings, say: Callable[[str], None]) -> None:
    """Run the device until it is interrupted.

    Raise DeviceError if it is not enrolled, if its key is damaged, or if another process runs it already.
    """
    check_data_source(settings.source)
    identity, key = home.read_identity(), home.read_key()
    trust = make_tls_context(identity.ca)
    clock = ServerClock(partial(fetch_server_time, identity.url, trust))
    address = identity.url.removeprefix("https://")
    with home.hold_lock():
        limit = choose_trainer_limit(settings.budget, settings.limit)
        say(f"the trainer is held to {settings.budget / 1e6:.0f} MB by {limit.sentence}")

        def tell(holding: Mapping[str, Any] | None) -> None:
            headers = make_signed_headers(key, clock.get_server_time())
            profile = make_device_profile(settings.budget, limit.name, dict(holding) if holding else None)
            send_profile(identity.url, trust, headers, profile)

        fleet = FleetClient(address, identity.ca, key, identity.node, clock.get_server_time)
        if sentence := describe_expiry(identity, clock.get_server_time()):
            say(sentence)
        supervisor = TrainerSupervisor(settings.source, settings.budget, settings.idle, limit)
        try:
            DeviceNode(home, fleet, supervisor, clock, tell, say).run()
        finally:
            fleet.close()
