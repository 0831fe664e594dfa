"""Train requests and client updates inside Flower's messages. A device's own process imports this without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.wire.protocol_version import PROTOCOL_VERSION, check_protocol_version

__all__ = [
    "TRAIN_REQUEST",
    "make_request_record",
    "make_update_record",
    "read_shared_state",
    "read_train_request",
    "state_file",
]

TRAIN_REQUEST = "train_request"
_OF_VERSION_1 = "order"
"""The record's name in protocol 1. A device of protocol 1 that does not find it replies that it is too old."""


def make_request_record(fields: Mapping[str, str | int]) -> ConfigRecord:
    """Return a record with the fields of a train request and the protocol version."""
    return ConfigRecord({"protocol": PROTOCOL_VERSION, **fields})


def read_train_request(content: RecordDict) -> dict[str, str | int]:
    """Return the fields of the train request in a message.

    Raise DeviceError if the server speaks another protocol, KeyError if the message carries no request.
    """
    records = content.config_records
    if TRAIN_REQUEST not in records and _OF_VERSION_1 in records:
        check_protocol_version(1)
    fields = {key: value for key, value in records[TRAIN_REQUEST].items() if isinstance(value, str | int)}
    check_protocol_version(int(fields.pop("protocol")))
    return fields


def read_shared_state(content: RecordDict) -> bytes:
    """Return the shared state in a message, as safetensors."""
    return content.array_records["state"]["safetensors"].data


def state_file(content: RecordDict) -> Path | None:
    """Return the file with the shared state, which only simulations use. Devices never call this function."""
    record = content.config_records.get("state_file")
    return None if record is None else Path(str(record["path"]))


def make_update_record(deltas: bytes, report: Mapping[str, float | Sequence[float]]) -> RecordDict:
    """Return the content of a reply: the deltas as safetensors, and a report of numbers and lists of numbers."""
    fields: dict[str, int | float | list[int] | list[float]] = {
        name: list(figure) if isinstance(figure, Sequence) else figure for name, figure in report.items()
    }
    array = Array(dtype="uint8", shape=(len(deltas),), stype="safetensors", data=deltas)
    return RecordDict({"delta": ArrayRecord({"safetensors": array}), "report": MetricRecord(fields)})
