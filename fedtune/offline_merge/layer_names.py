"""The depth of a tensor in a model, from the first number in its name."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["LayerTensorName", "compute_relative_depths", "parse_layer_name", "stacks"]

_LAYER = 3
"""The smallest number of tensors in a layer. A numbered step of a sequential head has at most two."""


class LayerTensorName(NamedTuple):
    """A tensor's name in three parts: the prefix before the layer number, the number, and the rest."""

    before: str
    number: int
    rest: str

    def name_in_layer(self, number: int) -> str:
        """Return the name of the same tensor in another layer."""
        return f"{self.before}.{number}.{self.rest}"


def parse_layer_name(name: str) -> LayerTensorName | None:
    """Split a tensor's name; None if it contains no number."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit() and place:
            return LayerTensorName(".".join(parts[:place]), int(part), ".".join(parts[place + 1 :]))
    return None


def stacks(names: Iterable[str]) -> list[str]:
    """Return the prefix of each stack of layers, e.g. ``model.layers``; the stack with the most tensors first.

    An encoder and a decoder are two stacks, and so are the towers of a vision-language model. If no numbered part is
    large enough for a layer, all numbered parts count.
    """
    counts: dict[str, Counter[int]] = {}
    for name in names:
        if (found := parse_layer_name(name)) is not None:
            counts.setdefault(found.before, Counter())[found.number] += 1
    large = [before for before, numbers in counts.items() if max(numbers.values()) >= _LAYER]
    return sorted(large or counts, key=lambda before: -counts[before].total())


def compute_relative_depths(names: Iterable[str]) -> dict[str, float]:
    """Return depths from 0 at the first layer of a stack to 1 at the last.

    Embeddings count as the first layer, other tensors outside the layers as the last. The only layer of a stack is its
    last.
    """
    listed = list(names)
    known = set(stacks(listed))
    layers = {name: found for name in listed if (found := parse_layer_name(name)) is not None and found.before in known}
    last = {before: max(one.number for one in layers.values() if one.before == before) for before in known}

    def depth(name: str) -> float:
        found = layers.get(name)
        if found is None:
            return 0.0 if _is_first(name) else 1.0
        return found.number / last[found.before] if last[found.before] else 1.0

    return {name: depth(name) for name in listed}


def _is_first(name: str) -> bool:
    return any(word in name for word in ("embed", "wte.", "wpe."))
