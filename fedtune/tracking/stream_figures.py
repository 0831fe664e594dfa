"""The figures of continual learning, each a pure function of the accuracy matrix, under the name its source gives it.

R[i, j] is the accuracy on task j after visit i, R[j, j] that at the end of task j's first visit, T the last row. A
score that does not exist counts nowhere, and a figure without any score is None.

| figure | formula | source |
|---|---|---|
| accuracy | mean_j R[T, j] | GEM, arXiv 1706.08840 |
| accuracy_all | the same, weighted by the tasks' test examples | class-incremental papers |
| incremental | mean_i mean_{j <= i} R[i, j] | iCaRL; ``incremental_all`` weighted by examples: PILOT |
| forgetting | mean_{j < T} (max_{j <= l < T} R[l, j] - R[T, j]) | Chaudhry, arXiv 1801.10112, equation 3 |
| forgetting_first | mean_{j < T} (R[j, j] - R[T, j]) = -bwt | Avalanche's ``Forgetting`` |
| bwt | mean_{j < T} (R[T, j] - R[j, j]) | GEM |
| bwt_all | mean_{j < i} (R[i, j] - R[j, j]) | Díaz-Rodríguez, arXiv 1810.13166 |
| fwt | mean_{j > 1} (R[j - 1, j] - R[0, j]) | GEM, with the start of this model as the baseline |
| fwt_raw | mean_{0 < i < j} R[i, j] | Díaz-Rodríguez |
| learning | mean_j R[j, j] | Riemer, arXiv 1810.11910 |
| intransigence | mean_j (R*[j] - R[j, j]), R* the final row of a reference run | Chaudhry, equation 4 |
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedtune.tracking.task_matrix import TaskMatrix

__all__ = ["FIGURES", "compute_client_figures", "compute_figures", "compute_intransigence"]

Figure = float | None


def _compute_accuracy(matrix: TaskMatrix) -> Figure:
    return _mean(_list_scores(matrix, matrix.last))


def _compute_accuracy_all(matrix: TaskMatrix) -> Figure:
    return _weighted_mean(matrix, matrix.last)


def _compute_incremental(matrix: TaskMatrix) -> Figure:
    return _mean(_mean(_list_scores(matrix, row)) for row in range(1, matrix.last + 1))


def _compute_incremental_all(matrix: TaskMatrix) -> Figure:
    return _mean(_weighted_mean(matrix, row) for row in range(1, matrix.last + 1))


def _compute_forgetting(matrix: TaskMatrix) -> Figure:
    """Subtract the last score of each earlier task from its best score before the last row; negative if it improved."""
    last, lost = matrix.last, []
    for task, row, _ in matrix.iter_learned():
        earlier = [score for each in matrix.rows[row:last] if (score := each[task]) is not None]
        final = matrix.get(last, task)
        if earlier and final is not None:
            lost.append(max(earlier) - final)
    return _mean(lost)


def _compute_forgetting_first(matrix: TaskMatrix) -> Figure:
    gained = _compute_bwt(matrix)
    return None if gained is None else -gained


def _compute_bwt(matrix: TaskMatrix) -> Figure:
    return _mean(_list_changes(matrix, matrix.last))


def _compute_bwt_all(matrix: TaskMatrix) -> Figure:
    return _mean(change for row in range(2, matrix.last + 1) for change in _list_changes(matrix, row))


def _compute_fwt(matrix: TaskMatrix) -> Figure:
    gained = []
    for task in range(len(matrix.tasks)):
        end = matrix.find_first_end(task) or 0
        before, start = matrix.get(end - 1, task), matrix.get(0, task)
        if end > 1 and before is not None and start is not None:
            gained.append(before - start)
    return _mean(gained)


def _compute_fwt_raw(matrix: TaskMatrix) -> Figure:
    ends = [(task, matrix.find_first_end(task) or 0) for task in range(len(matrix.tasks))]
    return _mean(matrix.get(row, task) for task, end in ends for row in range(1, end))


def _compute_learning(matrix: TaskMatrix) -> Figure:
    return _mean(score for *_, score in matrix.iter_learned())


FIGURES: Mapping[str, Callable[[TaskMatrix], Figure]] = {
    "accuracy": _compute_accuracy,
    "accuracy_all": _compute_accuracy_all,
    "incremental": _compute_incremental,
    "incremental_all": _compute_incremental_all,
    "forgetting": _compute_forgetting,
    "forgetting_first": _compute_forgetting_first,
    "bwt": _compute_bwt,
    "bwt_all": _compute_bwt_all,
    "fwt": _compute_fwt,
    "fwt_raw": _compute_fwt_raw,
    "learning": _compute_learning,
}
_OF_LAST_ROW = frozenset({"accuracy", "accuracy_all"})


def compute_figures(matrix: TaskMatrix) -> dict[str, Figure]:
    """Compute every figure of a matrix, by name; None where the matrix has no score for it, or no order of tasks."""
    given = FIGURES if matrix.has_order else _OF_LAST_ROW
    return {name: compute(matrix) if name in given else None for name, compute in FIGURES.items()}


def compute_intransigence(matrix: TaskMatrix, reference: Mapping[str, Figure]) -> Figure:
    """Compute how far each task, when it was learned, stayed below the final score of a reference run, on average.

    ``reference`` are the final scores of a run that was trained on all tasks together, by task.
    """
    learned = matrix.iter_learned() if matrix.has_order else ()
    pairs = [(reference.get(matrix.tasks[task]), score) for task, _, score in learned]
    return _mean(best - score for best, score in pairs if best is not None)


def compute_client_figures(matrices: Sequence[TaskMatrix]) -> dict[str, tuple[Figure, int]]:
    """Average each figure over clients, equally weighted, and count the clients that have it."""
    every = [compute_figures(matrix) for matrix in matrices]
    found = {name: [value for one in every if (value := one[name]) is not None] for name in FIGURES}
    return {name: (_mean(values), len(values)) for name, values in found.items()}


def _list_changes(matrix: TaskMatrix, row: int) -> list[float]:
    """Return the change of each task that was scored before a row, from its first score to that row."""
    learned = [(matrix.get(row, task), score) for task, first, score in matrix.iter_learned() if first < row]
    return [now - score for now, score in learned if now is not None]


def _list_scores(matrix: TaskMatrix, row: int) -> list[Figure]:
    return [matrix.get(row, task) for task in matrix.list_seen(row)]


def _weighted_mean(matrix: TaskMatrix, row: int) -> Figure:
    """Average a row over the examples of the tasks seen so far; None if a task's examples are not known."""
    total, weight = 0.0, 0
    for task in matrix.list_seen(row):
        score, examples = matrix.get(row, task), matrix.examples[task] if matrix.examples else None
        if score is not None and examples is None:
            return None
        total, weight = total + (score or 0.0) * (examples or 0), weight + (0 if score is None else examples or 0)
    return total / weight if weight else None


def _mean(values: Iterable[Figure]) -> Figure:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
