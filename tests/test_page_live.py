"""A page follows a run by events: only what changed, bounded in number, and gone when the run ends."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.tracking import RunRecord, Store
from fedtune.web import live_events
from fedtune.web.live_events import MOST_STREAMS, LiveStreams
from tests.page_examples import open_page
from tests.store_examples import a_round, fill, start


def parse_events(text: str) -> list[tuple[str, dict[str, object]]]:
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def test_a_finished_run_has_one_event(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        fill(store)
        answer = client.get("/runs/film-1a2b/events")
        page = client.get("/runs/film-1a2b").text
        start(store, "queued-1", status="queued")
        queued = client.get("/runs/queued-1").text
        assert client.get("/runs/none/events").text == ""
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert parse_events(answer.text) == [("run", {"status": "completed", "rounds": 3, "planned": 3, "reason": ""})]
    assert "live.js" not in page, "a finished run opens no stream"
    assert 'data-events="/runs/queued-1/events"' in queued
    assert '<script src="/static/live.js" defer></script>' in queued


def test_events_carry_what_is_new_and_beats_stand_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, _):
        start(store, status="queued")
        steps = take_steps(store)

        def find(run_id: str) -> RunRecord | None:
            next(steps)
            return Store.find(store, run_id)

        monkeypatch.setattr(store, "find", find)
        found = parse_events(asyncio.run(collect(LiveStreams(store, pause=0.0))))
    told = [(kind, data.get("rounds"), data.get("status")) for kind, data in found if kind == "run"]
    assert told == [("run", 0, "queued"), ("run", 1, "queued"), ("run", 2, "queued"), ("run", 2, "failed")]
    assert 0 < sum(kind == "beat" for kind, _ in found) < 5
    assert all(len(json.dumps(data)) < 500 for _, data in found)


def take_steps(store: Store) -> Iterator[None]:
    """Before each look at the store something happens, or nothing."""
    yield
    for number in range(3):
        store.commit_round("film-1a2b", a_round(number))
        for _ in range(6):
            yield
    store.finish("film-1a2b", "failed", "out of memory " * 99)
    yield


async def collect(streams: LiveStreams) -> str:
    return "".join([one async for one in streams.iter_events("film-1a2b")])


def test_streams_are_bounded_and_closed_ones_do_not_count(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, _):
        start(store, status="queued")
        streams = LiveStreams(store, pause=0.0)

        async def run() -> tuple[int, int]:
            opened = [streams.iter_events("film-1a2b") for _ in range(MOST_STREAMS)]
            for one in opened:
                await anext(one)
            full = streams.make_response("film-1a2b").status_code
            for one in opened:
                await one.aclose()  # type: ignore[attr-defined]
            return full, streams.make_response("film-1a2b").status_code

        assert asyncio.run(run()) == (503, 200)


def test_the_script_is_small_and_asks_no_other_machine() -> None:
    text = (Path(live_events.__file__).parent / "static" / "live.js").read_text()
    assert len(text) < 3000
    assert "http" not in text
    assert "innerHTML" not in text
