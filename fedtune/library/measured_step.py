"""The memory that tensors of a training step occupy, measured in any loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from fedtune.accelerator import find_device, fork_random_state
from fedtune.memory import StorageMeter

__all__ = ["StepMemory", "measure", "measure_step"]


class StepMemory(NamedTuple):
    """Bytes of a training step: kept for the backward pass, the peak of both passes, and gradients of parameters."""

    activation_bytes: int
    peak_bytes: int
    gradient_bytes: int


def measure(*excluded: nn.Module | Tensor) -> StorageMeter:
    """Measure the tensors that are made inside a ``with`` block. Models and tensors that are ``excluded`` do not count.

    >>> import fedtune, torch
    >>> model = torch.nn.Linear(1000, 10)
    >>> x = torch.ones(8, 1000)
    >>> with fedtune.measure(model, x) as memory:
    ...     loss = model(x).relu().sum()
    ...     kept = memory.current_bytes
    ...     loss.backward()
    >>> kept, memory.gradient_bytes
    (324, 40040)
    """
    tensors = [[one] if isinstance(one, Tensor) else chain(one.parameters(), one.buffers()) for one in excluded]
    return StorageMeter(excluded=chain(*tensors))


def measure_step(
    model: nn.Module, batch: Mapping[str, Tensor], compute_loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
) -> StepMemory:
    """The memory of one training step. Gradients, buffers, random numbers and the mode are as before afterwards."""
    with _restored(model), fork_random_state(find_device(model)), measure(model) as meter:
        loss = compute_loss(model.train(), batch)
        kept = meter.current_bytes
        loss.backward()
        return StepMemory(kept, meter.peak_bytes, meter.gradient_bytes)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    mode = {layer: layer.training for layer in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad()
    try:
        yield
    finally:
        for layer, training in mode.items():
            layer.training = training
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
