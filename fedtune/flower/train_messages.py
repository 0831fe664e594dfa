"""What an order and an answer look like inside Flower's messages; light: a device's own process imports it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

__all__ = ["make_update_record", "read_shared_state", "read_train_request", "state_file"]


def read_train_request(content: RecordDict) -> dict[str, str | int]:
    """The fields of the order in a message; KeyError when it carries none."""
    return {key: value for key, value in content.config_records["order"].items() if isinstance(value, str | int)}


def read_shared_state(content: RecordDict) -> bytes:
    """The shared state in a message, as safetensors."""
    return content.array_records["state"]["safetensors"].data


def state_file(content: RecordDict) -> Path | None:
    """Where a simulation's server left the shared state on the disk that both use; a device never looks."""
    record = content.config_records.get("state_file")
    return None if record is None else Path(str(record["path"]))


def make_update_record(deltas: bytes, report: Mapping[str, float | Sequence[float]]) -> RecordDict:
    """Deltas, as safetensors, and a report, of numbers and of lists of real ones."""
    fields: dict[str, int | float | list[int] | list[float]] = {
        name: list(figure) if isinstance(figure, Sequence) else figure for name, figure in report.items()
    }
    array = Array(dtype="uint8", shape=(len(deltas),), stype="safetensors", data=deltas)
    return RecordDict({"delta": ArrayRecord({"safetensors": array}), "report": MetricRecord(fields)})
