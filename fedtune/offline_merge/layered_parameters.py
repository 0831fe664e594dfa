"""Parameters in layers: a value, a list interpolated over the depth of the model, or values for some tensor names."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from fedtune.recipe.schema import SettingsModel

__all__ = ["FilteredValue", "LayeredValue", "ParameterLayer", "Value", "find_value", "over_depth", "resolve_value"]

Value = bool | int | float | str
_SCALARS = (bool, int, float, str)
_BY_FILTER: tuple[set[str], ...] = ({"value"}, {"filter", "value"})


class FilteredValue(SettingsModel):
    """A value for tensors whose name contains ``filter``; without one, or with ``*``, for all tensors."""

    filter: str | None = None
    value: Value | list[Value]


def _check_value(setting: Any) -> Any:
    """Check a value, a list of values or filtered values; ValueError for anything else."""
    if isinstance(setting, _SCALARS):
        return _scalar(setting)
    if isinstance(setting, dict):
        return _check_value([setting])
    if isinstance(setting, list):
        if all(isinstance(item, _SCALARS) for item in setting):
            return [_scalar(item) for item in setting]
        if all(isinstance(item, dict) and item.keys() in _BY_FILTER for item in setting):
            return [FilteredValue(filter=item.get("filter"), value=_check_value(item["value"])) for item in setting]
    raise ValueError("write a value, a list of values over the depth, or a list of {filter: ..., value: ...}")


def _scalar(value: Value) -> Value:
    """Return the value. YAML reads 5e-1, which has no point, as text; it becomes a number."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number to calculate with; write a finite one")
    return value


LayeredValue = Annotated[Any, AfterValidator(_check_value)]
ParameterLayer = Mapping[str, LayeredValue]


def find_value(key: str, layers: Sequence[ParameterLayer], name: str, depth: float) -> Value | None:
    """Return the value of the first layer that has one for this tensor, or None."""
    for layer in layers:
        if key in layer and (found := resolve_value(layer[key], name, depth)) is not None:
            return found
    return None


def resolve_value(setting: Any, name: str, depth: float) -> Value | None:
    """Return a setting for a tensor; ``depth`` runs from 0 at the first layer to 1 at the last."""
    if not isinstance(setting, list):
        return setting  # type: ignore[no-any-return]
    if not _by_filter(setting):
        return _interpolate(setting, depth)
    for item in setting:
        if item.filter in (None, "*") or item.filter in name:
            return resolve_value(item.value, name, depth)
    return None


def over_depth(setting: Any) -> bool:
    """Whether a setting changes with the depth for some tensors."""
    if not isinstance(setting, list):
        return False
    values = [item.value if isinstance(item, FilteredValue) else item for item in setting]
    return any(isinstance(value, list) for value in values) or (len(setting) > 1 and not _by_filter(setting))


def _by_filter(setting: Sequence[Any]) -> bool:
    return any(isinstance(item, FilteredValue) for item in setting)


def _interpolate(values: Sequence[Value], depth: float) -> Value | None:
    """Interpolate linearly between evenly spaced numbers. Take the last switch or word before the depth."""
    if not values:
        return None
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    one, other = values[low], values[high]
    if isinstance(one, bool | str) or isinstance(other, bool | str):
        return one
    return one + (place - low) * (other - one)
