"""The picture of runs: it says what it must, whatever was or was not recorded."""

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedtune.errors import StoreError
from fedtune.tracking import RoundRecord, RunRecord, Store
from fedtune.tracking.run_plot import draw_runs
from tests.store_examples import a_client_record, a_metric, a_round, fill

Recorded = list[tuple[RunRecord, list[RoundRecord]]]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Two runs: three rounds of one, one round of the other."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    with Store.open() as store:
        fill(store, "film-1a2b")
        fill(store, "film-3c4d", rounds=1, name="other")
        yield [(run, store.rounds(run.id)) for run in reversed(store.runs())]


def texts(path: Path) -> str:
    """Everything an SVG says; matplotlib keeps each text as a comment beside its glyphs."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return "\n".join(element.text or "" for element in root.iter() if callable(element.tag))


def test_one_run_is_drawn_by_domain(recorded: Recorded, tmp_path: Path) -> None:
    draw_runs(recorded[:1], tmp_path / "one.svg")
    said = texts(tmp_path / "one.svg")
    for expected in ("film-1a2b", "Accuracy on validation", "tweets", "Training loss", "from clients", "tablet", "GB"):
        assert expected in said


def test_several_runs_are_drawn_together(recorded: Recorded, tmp_path: Path) -> None:
    draw_runs(recorded, tmp_path / "both.svg")
    said = texts(tmp_path / "both.svg")
    assert "2 runs compared" in said
    assert "other" in said
    assert "tweets" not in said


@pytest.mark.parametrize(
    "rounds",
    [
        [a_round(0)],
        [a_round(0, metrics=()), a_round(1, metrics=(), client_records=())],
        [
            a_round(
                1,
                metrics=(a_metric(math.nan),),
                client_records=(a_client_record(0, train_loss=math.nan, activation_memory=0),),
            )
        ],
        [a_round(1, metrics=(a_metric(31.5, "test", "all", "perplexity"),))],
        [a_round(1, client_records=tuple(a_client_record(client) for client in range(500)))],
    ],
    ids=["untrained", "nothing measured", "diverged", "test only", "crowd"],
)
def test_whatever_was_recorded_can_be_drawn(recorded: Recorded, rounds: list[RoundRecord], tmp_path: Path) -> None:
    draw_runs([(recorded[0][0], rounds)], tmp_path / "odd.png")
    assert (tmp_path / "odd.png").read_bytes().startswith(PNG)
    draw_runs([(recorded[0][0], rounds), recorded[1]], tmp_path / "odd2.png")


def test_a_picture_needs_a_known_ending_a_round_and_a_place(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"must end in \.png or \.svg"):
        draw_runs(recorded, tmp_path / "one.jpeg")
    with pytest.raises(StoreError, match="no recorded round to draw yet"):
        draw_runs([(recorded[0][0], [])], tmp_path / "one.png")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        draw_runs(recorded, tmp_path / "file" / "one.png")
