"""The stream of a run that is not finished: server-sent events that carry only what is new.

A page that is open for a day gets an event for each round and a heartbeat; it keeps nothing of them. The run does not
notice: the stream reads one row of the store each second.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from fedtune.tracking import RunRecord, Store
from fedtune.untrusted import clean_text

__all__ = ["MOST_STREAMS", "LiveStreams", "describe_progress"]

MOST_STREAMS = 16
"""So many pages are live at once; others are asked to come back."""
_PAUSE = 1.0  # seconds between two looks at the store
_BEAT = 5  # looks between two heartbeats
_ENDED = ("completed", "failed", "interrupted")


def describe_progress(run: RunRecord) -> dict[str, Any]:
    """Return what a page is told of a run: a few numbers and words, whatever the number of clients."""
    return {
        "status": run.status,
        "rounds": run.rounds_completed,
        "planned": run.rounds_planned,
        "reason": clean_text(run.reason),
    }


class LiveStreams:
    """The open streams of one store."""

    def __init__(self, store: Store, pause: float = _PAUSE) -> None:
        self._store, self._pause, self._open = store, pause, 0

    def make_response(self, run_id: str) -> Response:
        """Return the stream of a run, or a refusal if too many are open."""
        if self._open >= MOST_STREAMS:
            return PlainTextResponse("Too many pages are live; close one.\n", 503, {"retry-after": "60"})
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(self.iter_events(run_id), media_type="text/event-stream", headers=headers)

    async def iter_events(self, run_id: str) -> AsyncIterator[str]:
        """Yield an event for each change of a run and heartbeats between them, until it ends or is deleted."""
        self._open += 1
        try:
            shown, looks = None, 0
            while (run := await run_in_threadpool(self._store.find, run_id)) is not None:
                found = describe_progress(run)
                if found != shown:
                    yield _format_event("run", found)
                elif looks % _BEAT == 0:
                    yield _format_event("beat", {})
                shown, looks = found, looks + 1
                if run.status in _ENDED:
                    return
                await asyncio.sleep(self._pause)
        finally:
            self._open -= 1


def _format_event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
