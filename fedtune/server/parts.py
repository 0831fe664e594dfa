"""What each device class is sent and asked for in a round, and how what it sends comes to fit the shared state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedtune import checkpoint, merging, techniques
from fedtune.contribution import Contribution, Form, Pair, pack, unpack
from fedtune.files import write
from fedtune.sparse import to_wire
from fedtune.stored_state import StoredState
from fedtune.training import Workshop, received, shapes, trained_in
from fedtune.training.told_activity import asked_activity

__all__ = ["Part", "Parts", "part_of", "sent_names", "widened"]

State = Mapping[str, Tensor]
_BYTES = {"F32": 4, "I32": 4, "I64": 8, "U8": 1, "F16": 2, "BF16": 2, "F64": 8}
_HEADER, _HEADER_ENTRY = 1024, 256
"""Bytes of a safetensors header: once, and per tensor beside its name, each letter of which may be an escape."""


@dataclass(frozen=True)
class Part:
    """One class's ``payload`` down, or its file, and the shapes and forms of what must come up."""

    payload: bytes | Path
    expected: Mapping[str, tuple[int, ...]]
    extras: Mapping[str, Form]

    @property
    def values(self) -> int:
        """How many values the deltas of an update have together."""
        return sum(math.prod(shape) for shape in self.expected.values())

    @property
    def most_bytes(self) -> int:
        """The size that no update of this round exceeds: its tensors, and a generous header that names them."""
        forms = {name: Form(shape) for name, shape in self.expected.items()} | dict(self.extras)
        values = sum(math.prod(form.shape) * _BYTES[form.dtype] for form in forms.values())
        return values + _HEADER + sum(_HEADER_ENTRY + 6 * len(name) for name in forms)

    @property
    def size(self) -> int:
        """Bytes that a client of the class is sent."""
        return self.payload.stat().st_size if isinstance(self.payload, Path) else len(self.payload)


def part_of(shop: Workshop, part: Workshop, state: State, number: int, folder: Path | None = None) -> Part:
    """Of round ``number``, for clients that train with ``part``, which may be the whole workshop itself.

    With ``folder`` the payload is a file: the checkpoint itself where that is what the class is sent, else one there.
    """
    wire = to_wire(state if part is shop else _narrowed(shop, part, state))
    expected = {name: tuple(wire[name].shape) for name in trained_in(part, number)}
    extras = techniques.asked(part.techniques, part.model, number)
    payload = pack(wire) if folder is None else _file(wire, folder)
    return Part(payload, expected, extras | asked_activity(part.model, part.recipe, expected))


def _file(wire: State, folder: Path) -> Path:
    """The file of a state, written under its digest unless it is on disk as it is."""
    if isinstance(wire, StoredState):
        return wire.path
    path = folder / f"state-{checkpoint.digest(wire)}.safetensors"
    if not path.exists():
        checkpoint.save(path, wire)
    return path


class Parts:
    """What each client is sent and asked for in round ``number``; clients of one device class share it.

    With ``folder``, which server and clients must both see, it is sent as the name of a file.
    """

    def __init__(self, shop: Workshop, state: State, number: int, folder: Path | None = None) -> None:
        self.number = number
        self._shop, self._state, self._folder = shop, state, folder
        self._made: dict[int, Part] = {}

    def of(self, client: int) -> Part:
        """A client's, made when the first of its class is asked for."""
        part = self._shop.of(client)
        if id(part) not in self._made:
            self._made[id(part)] = part_of(self._shop, part, self._state, self.number, self._folder)
        return self._made[id(part)]


def sent_names(shop: Workshop, number: int) -> list[str]:
    """Names of the tensors that any class trains, and so sends back, in a round."""
    named = dict.fromkeys(trained_in(shop, number))
    for part in shop.parts.values():
        named |= dict.fromkeys(trained_in(part, number))
    return list(named)


def widened(shop: Workshop, part: Workshop, sent: Contribution) -> None:
    """Bring the low-rank pairs of a contribution to the shared rank, in its file."""
    if part is not shop:
        deltas = unpack(sent.path.read_bytes())
        write(sent.path, pack(merging.widened(deltas, shapes(shop.model), *_pairs(shop, part))))


def _narrowed(shop: Workshop, part: Workshop, state: State) -> dict[str, Tensor]:
    return merging.narrowed(state, received(shop, part), *_pairs(shop, part))


def _pairs(shop: Workshop, part: Workshop) -> tuple[list[Pair], list[Pair]]:
    return techniques.pairs(shop.techniques, shop.model), techniques.pairs(part.techniques, part.model)
