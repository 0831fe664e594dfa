"""Builds modules without numbers: their parameters are on the meta device, and nothing is drawn.

Drawing on the meta device would import torch's compiler, which takes 70 MB.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["build_shapes_only"]


@contextmanager
def build_shapes_only() -> Iterator[None]:
    """Let modules that are built in the block have parameters without numbers."""
    with torch.device("meta"), _NoDrawing():
        yield


class _NoDrawing(TorchFunctionMode):
    """Lets the functions of ``torch.nn.init`` return their tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else named["tensor"]
        return func(*args, **named)
