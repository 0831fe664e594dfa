"""Record the modules that a network runs on a blank image, in order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError

__all__ = ["ModuleCall", "trace_modules"]

_SIDE = 64
"""The side of the image in pixels."""


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module, with the times it began and ended."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    started_at: int
    ended_at: int

    def is_inside(self, other: "ModuleCall") -> bool:
        """Whether it ran during the other call."""
        return other.started_at < self.started_at and self.ended_at < other.ended_at


@dataclass
class _Recorder:
    clock: Iterator[int] = field(default_factory=count)
    begun: list[int] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)

    def begin(self, *_: Any) -> None:
        self.begun.append(next(self.clock))

    def end(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        begin, end = self.begun.pop(), next(self.clock)
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            self.calls.append(ModuleCall(name, module, args[0], out, begin, end))


def trace_modules(model: nn.Module) -> list[ModuleCall]:
    """The calls of the model's modules, in the order they began; ModelError if the model takes no image."""
    recorder = _Recorder()
    hooks = [
        hook
        for name, module in model.named_modules()
        for hook in (
            module.register_forward_pre_hook(recorder.begin),
            module.register_forward_hook(partial(recorder.end, name)),
        )
    ]
    picture = next(model.parameters()).new_zeros(1, 3, _SIDE, _SIDE)
    try:
        with torch.no_grad(), _use_eval_mode(model):
            model(pixel_values=picture)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{type(model).__name__} cannot be tried out on a picture ({error}); choose lora") from error
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(recorder.calls, key=lambda call: call.started_at)


@contextmanager
def _use_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of each module is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
