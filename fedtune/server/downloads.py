"""The payload of each client in a round: the whole state, or increments to the base weights that the client holds.

Only devices receive increments. In a simulation, clients read the server's own state, but the bytes that a device would
receive are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedtune import checkpoint
from fedtune.files import write_bytes_atomically
from fedtune.merging import join_increments
from fedtune.server.bases import Bases
from fedtune.server.class_payloads import ClassPayload, RoundPayloads, State
from fedtune.wire.client_update import pack, packed_size
from fedtune.wire.recipe_codecs import build_down_pipeline
from fedtune.wire.state_message import encode_state
from fedtune.wire.stored_state import StoredState

__all__ = ["Download", "Downloads"]


@dataclass(frozen=True)
class Download:
    """A payload or its file, its size in bytes, and the digests of base weights as in ``TrainRequest``."""

    payload: bytes | Path
    size: int
    base_digest: str | None = None
    held_digest: str | None = None


class Downloads:
    """The downloads of one round. Clients of one device class that hold the same base weights share one.

    With ``folder``, which server and clients must share, the path of a file is sent instead of the payload.
    """

    def __init__(self, parts: RoundPayloads, bases: Bases, folder: Path | None, deployed: bool) -> None:
        self.parts, self.round_number = parts, parts.round_number
        self._bases, self._folder, self._deployed = bases, folder, deployed
        self._pipeline = build_down_pipeline(parts.recipe)
        self._made: dict[tuple[int, str | None], Download] = {}

    def get_for_client(self, client: int, whole: bool = False) -> Download:
        """Return the download of a client; with ``whole``, it contains all base weights."""
        part = self.parts.get_for_client(client)
        held = None if whole else self._bases.get_held_digest(client)
        key = id(part), held
        if key not in self._made:
            self._made[key] = (self._smaller(part, held) if held else None) or self._whole(part)
        return self._made[key]

    def _whole(self, part: ClassPayload) -> Download:
        payload = self._encode(part.wire) if self._folder is None else self._write(part.wire, self._folder)
        size = payload.stat().st_size if isinstance(payload, Path) else len(payload)
        return Download(payload, size, self._base() if self._deployed else None)

    def _smaller(self, part: ClassPayload, held: str) -> Download | None:
        """Return the state with increments instead of base weights; None if this is impossible or not smaller."""
        steps = self._bases.increments(held, self._base())
        if steps is None:
            return None
        rest = {name: part.wire[name] for name in part.wire if name not in self._bases.names}
        tensors: Mapping[str, Tensor] = rest | join_increments(steps)
        size = self._count_bytes(tensors)
        if size >= self._count_bytes(part.wire):
            return None
        if not self._deployed:
            return Download(self._made.setdefault((id(part), None), self._whole(part)).payload, size)
        return Download(self._encode(tensors), size, self._base(), held)

    def _encode(self, tensors: State) -> bytes:
        return pack(tensors) if self._pipeline is None else encode_state(self._pipeline, tensors)

    def _count_bytes(self, tensors: State) -> int:
        return packed_size(tensors) if self._pipeline is None else len(encode_state(self._pipeline, tensors))

    def _write(self, wire: State, folder: Path) -> Path:
        """Return the file of a state. It is named by its digest, and written only if it is not on disk yet."""
        if self._pipeline is None:
            return _file(wire, folder)
        path = folder / f"state-{checkpoint.hash_tensors(wire)}.coded"
        if not path.exists():
            write_bytes_atomically(path, self._encode(wire))
        return path

    def _base(self) -> str | None:
        return self._bases.digest(self.round_number, self.parts.state)


def _file(wire: State, folder: Path) -> Path:
    """Return the file of a state. It is named by its digest, and written only if it is not on disk yet."""
    if isinstance(wire, StoredState):
        return wire.path
    path = folder / f"state-{checkpoint.hash_tensors(wire)}.safetensors"
    if not path.exists():
        checkpoint.write_checkpoint(path, wire)
    return path
