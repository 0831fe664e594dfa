"""Frames between the device process and the trainer: a JSON header and a payload, each preceded by its length."""

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

from fedtune.child_processes import wait_until_readable

__all__ = ["STATE", "Frame", "TrainerChannel"]

STATE = "state"
"""The header key for the file of the start state. Without it, the payload is the state."""

_LENGTHS = struct.Struct(">QQ")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Frame:
    """One frame. ``header`` is a JSON object."""

    header: dict[str, Any]
    payload: bytes = b""

    def pieces(self) -> tuple[bytes, bytes]:
        """Return the frame as bytes: lengths and header, then the payload, which is not copied."""
        header = json.dumps(self.header).encode()
        return _LENGTHS.pack(len(header), len(self.payload)) + header, self.payload

    @classmethod
    def decode(cls, content: bytes) -> "Frame":
        """Return the frame whose joined pieces are ``content``; raise ValueError if it is incomplete."""
        start = _LENGTHS.size
        try:
            header, payload = _LENGTHS.unpack(content[:start])
        except struct.error as error:
            raise ValueError("this is not a frame") from error
        if len(content) != start + header + payload:
            raise ValueError("the frame is incomplete")
        return cls(json.loads(content[start : start + header]), content[start + header :])


class TrainerChannel:
    """One end of a stream socket. Methods raise EOFError if the other end is closed."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        try:
            for piece in frame.pieces():
                self._end.sendall(piece)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError("the other end is closed") from error

    def wait_until_ready(self, seconds: float) -> bool:
        """Whether a frame arrives, or the other end closes, within some seconds."""
        return wait_until_readable(self._end, seconds)

    def receive(self) -> Frame:
        """Wait for the next frame and return it."""
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
                raise EOFError("the other end is closed")
            held += piece
        return held

    def close(self) -> None:
        """Close this end."""
        self._end.close()
