"""The density of each layer for a given density of the model: Erdos-Renyi-Kernel (Evci et al., arXiv 1911.11134)."""

from collections.abc import Mapping

from fedtune.errors import ModelError

__all__ = ["count_active_weights"]

Shape = tuple[int, ...]


def count_active_weights(shapes: Mapping[str, Shape], num_unmasked: int, density: float) -> dict[str, int]:
    """How many entries of each weight are active, so that with ``num_unmasked`` others they are ``density`` of all.

    A layer's density is epsilon * sum(shape) / numel; where that reaches 1 the layer is dense and epsilon is solved for
    the others. Raises ModelError when what stays dense is more than the whole may be.
    """
    sizes = {name: _numel(shape) for name, shape in shapes.items()}
    budget = density * (sum(sizes.values()) + num_unmasked) - num_unmasked
    if budget < len(sizes):
        share = num_unmasked / (sum(sizes.values()) + num_unmasked)
        raise ModelError(f"density {density} is below the {share:.3f} of the model that no mask covers; raise density")
    full: set[str] = set()
    while True:
        free = {name: sum(shapes[name]) for name in sizes if name not in full}
        epsilon = (budget - sum(sizes[name] for name in full)) / max(1, sum(free.values()))
        filled = {name for name, parts in free.items() if epsilon * parts >= sizes[name]}
        if not filled:
            return {name: sizes[name] if name in full else max(1, round(epsilon * free[name])) for name in sizes}
        full |= filled


def _numel(shape: Shape) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
