"""The lines of ``runs show`` about drift: the newest signal, the alarms, and the clients whose data drift."""

from collections.abc import Sequence

from fedtune.tracking import RoundRecord

__all__ = ["format_drift"]

_SPLIT = "drift"
_NAMED = 5


def format_drift(rounds: Sequence[RoundRecord], patience: int) -> list[str]:
    """Return a line on all clients, and one on each client whose newest signal lies above the newest threshold."""
    rows = {record.number: _read(record) for record in rounds}
    threshold = next((row["threshold"] for row in reversed(rows.values()) if "threshold" in row), None)
    newest = {
        one.client: (record.number, one.value)
        for record in rounds
        for one in record.client_scores
        if one.name.startswith(f"{_SPLIT}-")
    }
    if threshold is None or not newest:
        return []
    drifting = {client: found for client, found in sorted(newest.items()) if found[1] > threshold}
    named = [f"client {client} drifts: {value:.2f} in round {number}" for client, (number, value) in drifting.items()]
    more = [f"{len(named) - _NAMED} more clients drift"] if len(named) > _NAMED else []
    return [_summarise(rows, threshold, patience), *named[:_NAMED], *more]


def _summarise(rows: dict[int, dict[str, float]], threshold: float, patience: int) -> str:
    """Return the line on all clients."""
    alarms = [str(number) for number, row in rows.items() if row.get("streak", 0) >= patience]
    opened = [str(int(row["opens"])) for row in rows.values() if "opens" in row]
    parts = [f"drift: the threshold is {threshold:.2f}"]
    parts.append(f"alarm in round {', '.join(alarms)}" if alarms else "no alarm")
    parts += [f"a task opened after round {', '.join(opened)}"] if opened else []
    return "; ".join(parts)


def _read(record: RoundRecord) -> dict[str, float]:
    return {one.name: one.value for one in record.metrics if (one.split, one.domain) == (_SPLIT, "all")}
