"""Where a tensor stands in the depth of a model, by the first number in its name."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Layered", "depths", "layer_of", "stem"]


class Layered(NamedTuple):
    """A tensor's name in three: what stands before the number of its layer, the number, and the rest."""

    before: str
    number: int
    rest: str

    def at(self, number: int) -> str:
        """The same tensor's name in another layer."""
        return f"{self.before}.{number}.{self.rest}"


def layer_of(name: str) -> Layered | None:
    """The layer a tensor belongs to; None when its name holds no number."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit() and place:
            return Layered(".".join(parts[:place]), int(part), ".".join(parts[place + 1 :]))
    return None


def stem(names: Iterable[str]) -> str | None:
    """What stands before the numbers of a model's layers, e.g. ``model.layers``; None when no name holds a number."""
    counts = Counter(found.before for name in names if (found := layer_of(name)) is not None)
    return max(counts, key=lambda before: counts[before]) if counts else None


def depths(names: Iterable[str]) -> dict[str, float]:
    """From 0 at the first layer to 1 at the last; embeddings count as the first, all else outside as the last."""
    listed = list(names)
    before = stem(listed)
    layers = {name: found.number for name in listed if (found := layer_of(name)) is not None and found.before == before}
    last = max(layers.values(), default=0)
    return {name: layers[name] / max(1, last) if name in layers else 0.0 if _is_first(name) else 1.0 for name in listed}


def _is_first(name: str) -> bool:
    return any(word in name for word in ("embed", "wte.", "wpe."))
