"""What each device class is sent and asked for in a round, and how what it sends comes to fit the shared state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtune import merging, techniques
from fedtune.contribution import Contribution, Form, Pair, pack, unpack
from fedtune.files import write
from fedtune.sparse import to_wire
from fedtune.training import Workshop, received, shapes, trained_in
from fedtune.training.told_activity import asked_activity

__all__ = ["Part", "Parts", "State", "part_of", "sent_names", "widened"]

State = Mapping[str, Tensor]
_BYTES = {"F32": 4, "I32": 4, "I64": 8, "U8": 1, "F16": 2, "BF16": 2, "F64": 8}
_HEADER, _HEADER_ENTRY = 1024, 256
"""Bytes of a safetensors header: once, and per tensor beside its name, each letter of which may be an escape."""


@dataclass(frozen=True)
class Part:
    """One class's state as it goes down, and the shapes and forms of what must come up."""

    wire: State
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


def part_of(shop: Workshop, part: Workshop, state: State, number: int) -> Part:
    """Of round ``number``, for clients that train with ``part``, which may be the whole workshop itself."""
    wire = to_wire(state if part is shop else _narrowed(shop, part, state))
    expected = {name: tuple(wire[name].shape) for name in trained_in(part, number)}
    extras = techniques.asked(part.techniques, part.model, number)
    return Part(wire, expected, extras | asked_activity(part.model, part.recipe, expected))


class Parts:
    """What each client is sent and asked for in round ``number``; clients of one device class share it."""

    def __init__(self, shop: Workshop, state: State, number: int) -> None:
        self.number, self.state = number, state
        self._shop = shop
        self._made: dict[int, Part] = {}

    def of(self, client: int) -> Part:
        """A client's, made when the first of its class is asked for."""
        part = self._shop.of(client)
        if id(part) not in self._made:
            self._made[id(part)] = part_of(self._shop, part, self.state, self.number)
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
