"""The picture of a stream: the matrix with its numbers, task borders, and the stability gap."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fedtune.tracking import RoundRecord, RunRecord, Store
from fedtune.tracking.plot_stream import draw_borders, draw_matrix, draw_stability_gap
from fedtune.tracking.run_plot import draw_runs
from fedtune.tracking.task_matrix import TaskMatrix
from tests.stream_examples import fill_stream
from tests.test_store_plot import texts

Recorded = list[tuple[RunRecord, list[RoundRecord]]]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    with Store.open() as store:
        fill_stream(store)
        fill_stream(store, "stream-3c4d", rounds=3)
        yield [(run, store.rounds(run.id)) for run in reversed(store.runs())]


def test_one_run_shows_the_matrix_in_place_of_the_memory(recorded: Recorded, tmp_path: Path) -> None:
    draw_runs(recorded[:1], tmp_path / "one.svg")
    said = texts(tmp_path / "one.svg").splitlines()
    for expected in ("after tweets", "start", "95", "30", "lowest to last: stability gap"):
        assert any(expected in line for line in said), expected
    assert not any("activation memory" in line for line in said)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_stream_that_has_just_begun_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    with Store.open() as store:
        fill_stream(store, rounds=rounds)
        draw_runs([(store.run("stream"), store.rounds("stream-1a2b"))], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_several_runs_keep_the_panel_of_the_memory(recorded: Recorded, tmp_path: Path) -> None:
    draw_runs(recorded, tmp_path / "two.svg")
    assert "activation memory" in texts(tmp_path / "two.svg")


def test_borders_stand_at_the_ends_of_visits_but_the_last(recorded: Recorded) -> None:
    axes = Figure().subplots()
    draw_borders(axes, recorded[0][1])
    assert [line.get_xdata()[0] for line in axes.lines] == [2, 4, 6]  # type: ignore[index]
    axes = Figure().subplots()
    draw_borders(axes, recorded[1][1])  # its second visit has begun
    assert [line.get_xdata()[0] for line in axes.lines] == [2]  # type: ignore[index]


def test_the_gap_leads_from_the_lowest_to_the_last_score_of_each_earlier_task(recorded: Recorded) -> None:
    axes = Figure().subplots()
    draw_stability_gap(axes, recorded[0][1], "validation")
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[::2]]  # type: ignore[arg-type]
    assert drawn == [
        ([3, 3], [pytest.approx(0.4), 0.85]),
        ([7, 7], [pytest.approx(0.25), 0.45]),
        ([7, 7], [pytest.approx(0.7), 0.9]),
    ]


def test_a_large_matrix_has_shades_without_numbers() -> None:
    axes = Figure().subplots()
    size = 20
    rows = tuple(tuple(None if task >= row else 0.5 for task in range(size)) for row in range(size + 1))
    draw_matrix(axes, TaskMatrix(tasks=tuple(f"t{n}" for n in range(size)), visits=tuple(range(size)), rows=rows))
    assert (len(axes.texts), len(axes.images)) == (0, 1)
