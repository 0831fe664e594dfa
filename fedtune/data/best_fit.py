"""Best-fit decreasing: put pieces into as few rows of a fixed size as a greedy order finds."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

__all__ = ["pack_best_fit"]


def pack_best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of places in ``sizes``: long pieces first, each into the row with the least room that it fits into.

    Pieces of one size keep their order. No piece is larger than ``capacity``. n pieces take O(n log n + n capacity).
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # those that some row has, ascending
    for piece in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        row, room = _take_row(rooms, with_room, int(sizes[piece]))
        if row is None:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(piece)
        _put_row(rooms, with_room, row, room - int(sizes[piece]))
    return rows


def _take_row(rooms: list[int], with_room: dict[int, list[int]], size: int) -> tuple[int | None, int]:
    """A row with the least room of at least ``size``, and that room."""
    place = bisect_left(rooms, size)
    if place == len(rooms):
        return None, 0
    room = rooms[place]
    row = with_room[room].pop()
    if not with_room[room]:
        del rooms[place]
    return row, room


def _put_row(rooms: list[int], with_room: dict[int, list[int]], row: int, room: int) -> None:
    if not with_room[room]:
        insort(rooms, room)
    with_room[room].append(row)
