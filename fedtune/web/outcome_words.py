"""The words, letters and classes of what became of a client in a round, and its reason in plain words."""

from collections.abc import Mapping

from fedtune.tracking import ClientRecord
from fedtune.untrusted import clean_text
from fedtune.web.number_text import format_duration, format_megabytes, format_number

__all__ = ["LETTERS", "describe_cell", "describe_reason", "find_outcome"]

LETTERS: Mapping[str, str] = {
    "merged": "",
    "late": "L",
    "declined": "D",
    "failed": "F",
    "refused": "R",
    "unused": "U",
}
"""The letter in the grid by outcome, as :data:`fedtune.tracking.run_detail.OUTCOMES` lists them."""
_OF_STATUS = {"error": "failed", "missing": "failed", "rejected": "refused"}
_USUAL = {
    "missing": "no reply in time",
    "error": "the client reported an error",
    "declined": "training does not fit its memory",
    "rejected": "the server's checks refused the update",
    "unused": "valid, but the round failed",
}
_LONGEST = 300


def find_outcome(record: ClientRecord) -> str:
    """Return the outcome of a client record."""
    if record.status == "merged":
        return "late" if record.staleness else "merged"
    return _OF_STATUS.get(record.status, record.status)


def describe_reason(record: ClientRecord) -> str:
    """Return the reason in plain words; the usual one if none is stored."""
    late = f"started {record.staleness} rounds before, merged with less weight" if record.staleness else ""
    return clean_text(record.reason, _LONGEST) or late or _USUAL.get(record.status, "")


def describe_cell(number: int, record: ClientRecord) -> str:
    """Return one line on a client in a round: outcome, reason and measures."""
    measures = (
        ("loss", format_number(record.train_loss) if record.tells_loss else ""),
        ("", format_duration(record.seconds) if record.seconds else ""),
        ("", f"{format_megabytes(record.bytes_up)} MB up" if record.bytes_up else ""),
        ("", f"{format_megabytes(record.peak_memory)} MB peak" if record.peak_memory else ""),
    )
    parts = [find_outcome(record), describe_reason(record), *(f"{name} {one}".strip() for name, one in measures if one)]
    return f"client {record.client}, round {number}: {', '.join(part for part in parts if part)}"
