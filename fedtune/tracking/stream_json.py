"""The part ``stream`` of a JSON document of a run: its tasks, accuracy matrix and figures; see docs/runs-schema.md."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedtune.tracking.records import RoundRecord, RunRecord
from fedtune.tracking.stream_figures import compute_client_figures, compute_figures
from fedtune.tracking.stream_ledger import compute_stream_figures, list_visits, make_matrix, make_scope_matrices
from fedtune.tracking.task_matrix import TaskMatrix

__all__ = ["make_stream_document"]


def make_stream_document(
    run: RunRecord, rounds: Sequence[RoundRecord], *, detailed: bool = False
) -> dict[str, Any] | None:
    """Describe the stream of a run; None without one. ``detailed`` adds visits, device classes and clients."""
    matrix = make_matrix(run, rounds)
    if matrix is None:
        return None
    found = {"tasks": matrix.tasks, "matrix": matrix.rows, "figures": compute_stream_figures(matrix, rounds)}
    if not detailed:
        return found
    scopes = make_scope_matrices(run, rounds)
    classes = {scope.removeprefix("class:"): one for scope, one in scopes.items() if scope.startswith("class:")}
    clients = {scope.removeprefix("client:"): one for scope, one in scopes.items() if scope.startswith("client:")}
    means = compute_client_figures(list(clients.values()))
    return found | {
        "visits": [asdict(one) for one in list_visits(rounds)],
        "device_classes": {name: _describe(one) for name, one in classes.items()},
        "clients": {name: _describe(one) for name, one in clients.items()},
        "client_figures": {name: {"mean": mean, "clients": number} for name, (mean, number) in means.items()},
    }


def _describe(matrix: TaskMatrix) -> dict[str, Any]:
    return {"matrix": matrix.rows, "figures": compute_figures(matrix)}
