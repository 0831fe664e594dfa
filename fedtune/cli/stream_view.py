"""The stream of a run in a terminal: its tasks, the accuracy matrix, and the figures of continual learning."""

from collections.abc import Iterator, Sequence

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fedtune.cli.plain_table import make_table
from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import ClientRecord, RoundRecord, RunRecord, TaskRecord
from fedtune.tracking.stream_figures import compute_client_figures, compute_figures
from fedtune.tracking.stream_ledger import compute_stream_figures, list_visits, make_matrix, make_scope_matrices
from fedtune.tracking.stream_reference import Reference
from fedtune.tracking.task_matrix import Score, TaskMatrix
from fedtune.untrusted import clean_text

__all__ = ["describe_setting_mix", "iter_stream_tables", "list_stream_rows"]

Rounds = Sequence[RoundRecord]
Recorded = Sequence[tuple[RunRecord, Rounds]]

_SHOWN = ("accuracy", "incremental", "forgetting", "bwt", "fwt", "learning", "gap")
_COMPARED = ("accuracy", "forgetting", "learning")
_MOST_COLUMNS = 10
"""A matrix of more tasks does not fit into 80 columns."""
_NAME = 24


def iter_stream_tables(run: RunRecord, rounds: Rounds, reference: Reference | None = None) -> Iterator[Table | Text]:
    """Yield the tables of a stream; none for a run without one."""
    matrix = make_matrix(run, rounds)
    if matrix is None:
        return
    yield _list_tasks(matrix, rounds)
    if len(matrix.tasks) <= _MOST_COLUMNS:
        yield _show_matrix(matrix)
    else:
        yield Text(f"The accuracy matrix has {len(matrix.tasks)} tasks: fedtune runs plot {run.id} draws it.")
    yield _show_figures(matrix, run, rounds, reference)


def list_stream_rows(recorded: Recorded) -> list[tuple[str, list[str]]]:
    """Return rows that compare the streams of runs; none if no run has one."""
    matrices = [make_matrix(run, rounds) for run, rounds in recorded]
    if not any(matrices):
        return []
    figures = [compute_figures(matrix) if matrix else {} for matrix in matrices]
    compared = [(name, [_format_percent(one.get(name)) for one in figures]) for name in _COMPARED]
    return [*((f"{name}, %", cells) for name, cells in compared), ("on device", [_stored(own) for _, own in recorded])]


def _measure_storage(rounds: Rounds) -> int | None:
    """Return the most bytes that a device stored for the stream; None if none was recorded."""
    stored = [one.stored_bytes for record in rounds for one in record.client_records if one.stored_bytes is not None]
    return max(stored, default=None)


def describe_setting_mix(recorded: Recorded) -> str | None:
    """Return a warning when some of the compared runs were told the task at test and others were not."""
    streams = [read_stored_recipe(run.recipe).get("stream") or {} for run, _ in recorded]
    settings = [one.get("setting") for one in streams]
    if "task" not in settings or not {one for one in settings if one} - {"task"}:
        return None
    return "Do not compare these accuracies: with the setting task, the task of an example is known when it is scored."


def _format_percent(score: Score) -> str:
    """Format a share for a table."""
    return "-" if score is None else f"{100 * score:.1f}"


def _list_tasks(matrix: TaskMatrix, rounds: Rounds) -> Table:
    """Return one line per visit, with what its rounds cost."""
    table = make_table("task", "rounds", "opened by", "clients>", "time>", "sent back>", "on device>")
    visits = list_visits(rounds)
    for one in visits:
        own = [record for record in rounds if one.first_round <= record.number <= (one.last_round or record.number)]
        records = [record for each in own for record in each.client_records]
        table.add_row(
            f"{matrix.tasks.index(one.name) + 1} {_clip(one.name)}",
            _span(one),
            one.opened_by,
            _count_clients(records),
            f"{sum(each.seconds for each in own):.1f} s",
            decimal(sum(record.bytes_up for record in records)),
            _stored(own),
        )
    for name in matrix.tasks:
        if name not in {one.name for one in visits}:
            table.add_row(f"{matrix.tasks.index(name) + 1} {_clip(name)}", "later", *["-"] * 5)
    return table


def _show_matrix(matrix: TaskMatrix) -> Table:
    """Return the matrix; scores of tasks that were not trained yet are in brackets."""
    table = make_table("accuracy, %", *(f"{number}>" for number in range(1, len(matrix.tasks) + 1)))
    for number, row in enumerate(matrix.rows):
        seen = matrix.list_seen(number)
        name = f"after {_clip(matrix.tasks[matrix.visits[number - 1]])}" if number else "before training"
        cells = [_format_percent(score) for score in row]
        table.add_row(name, *(cell if task in seen or cell == "-" else f"({cell})" for task, cell in enumerate(cells)))
    return table


def _show_figures(matrix: TaskMatrix, run: RunRecord, rounds: Rounds, reference: Reference | None) -> Table:
    scopes = make_scope_matrices(run, rounds)
    classes = {scope.partition(":")[2]: one for scope, one in scopes.items() if scope.startswith("class:")}
    clients = [one for scope, one in scopes.items() if scope.startswith("client:")]
    table = make_table(
        "figure, %", "run>", *(f"{_clip(name)}>" for name in classes), *(["clients>"] if clients else [])
    )
    found = [compute_stream_figures(matrix, rounds), *(compute_figures(one) for one in classes.values())]
    means = compute_client_figures(clients)
    for name in _SHOWN:
        mean, number = means.get(name, (None, 0))
        told = [f"{_format_percent(mean)} of {number}" if number else "-"] if clients else []
        table.add_row(name, *(_format_percent(one.get(name)) for one in found), *told)
    if reference is not None:
        table.add_row(f"intransigence towards {reference.run_id}", _format_percent(reference.intransigence))
    return table


def _span(visit: TaskRecord) -> str:
    if visit.last_round is None:
        return f"{visit.first_round}…"
    return (
        str(visit.first_round) if visit.first_round == visit.last_round else f"{visit.first_round}-{visit.last_round}"
    )


def _count_clients(records: Sequence[ClientRecord]) -> str:
    """Return how many of the selected clients had an update merged."""
    merged = {one.client for one in records if one.status == "merged"}
    return f"{len(merged)}/{len({one.client for one in records})}" if records else "-"


def _stored(rounds: Rounds) -> str:
    most = _measure_storage(rounds)
    return "-" if most is None else decimal(most)


def _clip(name: str) -> str:
    return clean_text(name, _NAME)
