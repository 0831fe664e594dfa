"""Parameters in layers: a value, a list drawn over the depth of the model, or values for some tensor names."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from fedtune.recipe import Section

__all__ = ["Filtered", "Layer", "Setting", "Value", "lookup", "value_at"]

Value = bool | int | float | str


class Filtered(Section):
    """A value for the tensors whose name contains ``filter``; without one, or with ``*``, for all."""

    filter: str | None = None
    value: Value | list[float]


def _checked(setting: Any) -> Any:
    """A value, numbers over the depth, or values by filter; ValueError for anything else."""
    if isinstance(setting, bool | int | float | str):
        return setting
    if isinstance(setting, list) and setting:
        if all(isinstance(item, int | float) for item in setting):
            return [float(item) for item in setting]
        if all(isinstance(item, dict) and item.keys() in ({"value"}, {"filter", "value"}) for item in setting):
            return [Filtered(**item) for item in setting]
    raise ValueError("write a value, a list of numbers over the depth, or a list of {filter: ..., value: ...}")


Setting = Annotated[Any, AfterValidator(_checked)]
Layer = Mapping[str, Setting]


def lookup(key: str, layers: Sequence[Layer], name: str, depth: float) -> Value | None:
    """The value of the first layer that has one for this tensor; None when no layer has."""
    for layer in layers:
        if key in layer and (found := value_at(layer[key], name, depth)) is not None:
            return found
    return None


def value_at(setting: Any, name: str, depth: float) -> Value | None:
    """A setting at a tensor; ``depth`` runs from 0 at the first layer to 1 at the last."""
    if not isinstance(setting, list):
        return setting  # type: ignore[no-any-return]
    if not any(isinstance(item, Filtered) for item in setting):
        return _between(setting, depth)
    for item in setting:
        if item.filter in (None, "*") or item.filter in name:
            return value_at(item.value, name, depth)
    return None


def _between(values: Sequence[float], depth: float) -> float | None:
    """Linear interpolation in evenly spaced values."""
    if not values:
        return None
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
