"""Frames between a device's process and its trainer: a JSON header and bytes, each preceded by its length."""

import json
import select
import socket
import struct
from dataclasses import dataclass
from typing import Any

__all__ = ["STATE", "Frame", "TrainerChannel"]

STATE = "state"
"""Names, in the header of an order, the file with the state to begin with; without one the payload is the state."""

_LENGTHS = struct.Struct(">QQ")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Frame:
    """``header`` is whatever JSON can say."""

    header: dict[str, Any]
    payload: bytes = b""

    def pieces(self) -> tuple[bytes, bytes]:
        """The frame as bytes: lengths with header, and the payload apart, so that a large one is not copied."""
        header = json.dumps(self.header).encode()
        return _LENGTHS.pack(len(header), len(self.payload)) + header, self.payload

    @classmethod
    def decode(cls, content: bytes) -> "Frame":
        """The frame whose pieces are joined in ``content``; ValueError when it is not whole."""
        start = _LENGTHS.size
        try:
            header, payload = _LENGTHS.unpack(content[:start])
        except struct.error as error:
            raise ValueError("this is no frame") from error
        if len(content) != start + header + payload:
            raise ValueError("this is not the whole frame")
        return cls(json.loads(content[start : start + header]), content[start + header :])


class TrainerChannel:
    """One end of a stream socket; EOFError once the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, frame: Frame) -> None:
        """Send a frame whole."""
        try:
            for piece in frame.pieces():
                self._end.sendall(piece)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError("the other end is gone") from error

    def wait_until_ready(self, seconds: float) -> bool:
        """Whether a frame begins, or the other end goes, within some seconds."""
        return bool(select.select([self._end], [], [], seconds)[0])

    def receive(self) -> Frame:
        """The next frame, once it is there."""
        header, payload = _LENGTHS.unpack(self._exactly(_LENGTHS.size))
        return Frame(json.loads(self._exactly(header)), bytes(self._exactly(payload)))

    def _exactly(self, count: int) -> bytearray:
        held = bytearray()
        while len(held) < count:
            try:
                piece = self._end.recv(min(_PIECE, count - len(held)))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError("the other end is gone")
            held += piece
        return held

    def close(self) -> None:
        """Let go of this end."""
        self._end.close()
