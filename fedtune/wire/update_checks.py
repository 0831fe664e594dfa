"""Checks a spooled client update: names, shapes, dtypes, values and norm."""

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.client_update import TensorSpec, iter_row_chunks, rows_of

__all__ = ["NO_NORM_LIMIT", "NormLimit", "check_client_update"]


class NormLimit(NamedTuple):
    """The largest L2 norm of an update, or None for no limit, and the recipe key that sets it."""

    max_norm: float | None
    recipe_key: str


NO_NORM_LIMIT = NormLimit(None, "federation.max_update_norm")


def check_client_update(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    extras: Mapping[str, TensorSpec],
    norm_limit: NormLimit = NO_NORM_LIMIT,
) -> float:
    """Return the L2 norm of a spooled payload's deltas, without ``extras``. The payload is read in chunks.

    Raises ClientUpdateError if the payload is not safetensors, or if its names, shapes, values or norm are wrong.
    """
    try:
        with safe_open(path, "pt") as deltas:
            _check_names(set(deltas.keys()), expected.keys() | extras.keys())
            for name, form in extras.items():
                _check_extra(deltas, name, form)
            norm = math.sqrt(sum(_square(deltas, name, expected[name]) for name in sorted(expected)))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ClientUpdateError(f"the payload is not safetensors ({error}); update the client") from error
    if norm_limit.max_norm is not None and norm > norm_limit.max_norm:
        raise ClientUpdateError(f"its norm {norm:.4g} is above {norm_limit.recipe_key} {norm_limit.max_norm:.4g}")
    return norm


def _check_names(sent: Set[str], expected: Set[str]) -> None:
    missing, unknown = sorted(expected - sent), sorted(sent - expected)
    if missing or unknown:
        raise ClientUpdateError(f"tensor names differ: missing {missing[:3]}, unknown {unknown[:3]}")


def _square(deltas: Any, name: str, shape: tuple[int, ...]) -> float:
    """Check the form and values of a delta, and return its squared L2 norm."""
    _check_form(deltas.get_slice(name), name, TensorSpec(shape))
    square = sum(
        float(torch.linalg.vector_norm(rows_of(deltas, name, start, stop), dtype=torch.float64)) ** 2
        for start, stop in iter_row_chunks(shape)
    )
    if not math.isfinite(square):
        raise ClientUpdateError(f"{name} holds values that are not finite")
    return square


def _check_extra(file: Any, name: str, form: TensorSpec) -> None:
    _check_form(file.get_slice(name), name, form)
    tensor: Tensor = file.get_tensor(name)
    if not bool(tensor.isfinite().all()):
        raise ClientUpdateError(f"{name} holds values that are not finite")
    if not form.negative and bool((tensor < 0).any()):
        raise ClientUpdateError(f"{name} holds negative numbers")
    if not tensor.is_floating_point() and any(not 0 <= number < form.upper_bound for number in _range(tensor)):
        raise ClientUpdateError(f"{name} holds numbers outside 0 to {form.upper_bound - 1}")
    if form.required_sum is not None and int(tensor.sum()) != form.required_sum:
        raise ClientUpdateError(f"{name} adds up to {int(tensor.sum())} instead of {form.required_sum}")


def _range(tensor: Tensor) -> list[int]:
    """Return the minimum and the maximum, or an empty list for an empty tensor."""
    return [int(tensor.min()), int(tensor.max())] if tensor.numel() else []


def _check_form(tensor: Any, name: str, form: TensorSpec) -> None:
    if tuple(tensor.get_shape()) != form.shape:
        raise ClientUpdateError(f"{name} has shape {list(tensor.get_shape())} instead of {list(form.shape)}")
    if tensor.get_dtype() != form.dtype:
        raise ClientUpdateError(f"{name} is {tensor.get_dtype()} instead of {form.dtype}")
