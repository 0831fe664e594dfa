"""Gradient checkpointing of one call: its backward pass runs the call again instead of keeping its activations.

torch.utils.checkpoint does the same, and imports torch's compiler for it: 68 MB and a second per process. Here nothing
is compiled. The results are the same bits: the operations, their order, random numbers and autocast are the same.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedtune.accelerator import fork_random_state

__all__ = ["recompute_in_backward"]

T = TypeVar("T")


def recompute_in_backward(run: Callable[..., T], *inputs: Any) -> T:
    """Return ``run(*inputs)``. Only tensors among the inputs are kept for backward, which runs the call again.

    ``run`` must do the same each time: it may draw random numbers of torch, but change nothing. Calls may be nested.
    """
    if not torch.is_grad_enabled():
        return run(*inputs)
    call = _Call(run, inputs)
    with saved_tensors_hooks(call.pack, call.unpack):
        return run(*inputs)


class _Place:
    """Stands in the graph for a tensor that is made again when backward asks for it."""

    __slots__ = ("__weakref__",)


class _CompletedError(BaseException):
    """Ends the second run when the last tensor that backward needs is made. No ``except Exception`` holds it up."""


class _Call:
    """A call that is run once forward, and again when backward first needs one of its tensors."""

    def __init__(self, run: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self._run = run
        self._inputs = _SavedInputs(inputs)
        self._state = _State([one.device for one in inputs if isinstance(one, Tensor)])
        self._places: list[weakref.ref[_Place]] = []
        self._made: weakref.WeakKeyDictionary[_Place, Tensor] = weakref.WeakKeyDictionary()

    def pack(self, _: Tensor) -> _Place:
        place = _Place()
        self._places.append(weakref.ref(place))
        return place

    def unpack(self, place: _Place) -> Tensor:
        if place not in self._made:
            self._run_again()
        if place not in self._made:
            raise RuntimeError(
                "a checkpointed call saved fewer tensors when it was repeated; it must not depend on state"
            )
        return self._made.pop(place)

    def _run_again(self) -> None:
        numbers = iter(range(len(self._places)))

        def keep(tensor: Tensor) -> Tensor:
            number = next(numbers)
            if (place := self._places[number]()) is not None:
                self._made[place] = tensor.detach()
            if number + 1 == len(self._places):
                raise _CompletedError
            return tensor.detach()

        with self._state.restore(), torch.enable_grad(), saved_tensors_hooks(keep, _return_same):
            try:
                self._run(*self._inputs.read())
            except _CompletedError:
                return


def _return_same(tensor: Tensor) -> Tensor:
    return tensor


class _State:
    """Generators and autocast as they are now, on the CPU and on the devices of the inputs."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._random = torch.get_rng_state()
        self._device = next((one for one in devices if one.type not in ("cpu", "meta")), torch.device("cpu"))
        if self._device.type != "cpu":
            self._device_random = torch.get_device_module(self._device).get_rng_state(self._device)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
            for kind in dict.fromkeys(("cpu", self._device.type))
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def restore(self) -> Iterator[None]:
        """Restore them in the block."""
        with fork_random_state(self._device), ExitStack() as stack:
            torch.set_rng_state(self._random)
            if self._device.type != "cpu":
                torch.get_device_module(self._device).set_rng_state(self._device_random, self._device)
            for kind, enabled, dtype, cache in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


class _SavedInputs:
    """The inputs of a call. Autograd keeps the tensors, so that an outer checkpointed call, or a meter, sees them."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self._tensors = {place: one for place, one in enumerate(inputs) if isinstance(one, Tensor)}
        self._requires_grad = {place: one.requires_grad for place, one in self._tensors.items()}
        self._others = tuple(None if isinstance(one, Tensor) else one for one in inputs)
        # Up to torch 2.10 the graph lets go of what it saved as soon as its result is gone.
        self._kept: Any = _Keep.apply(torch.empty(0, requires_grad=True), *self._tensors.values())
        self._tensors.clear()

    def read(self) -> list[Any]:
        """Return the inputs, without the graph they came from."""
        found = list(self._others)
        for (place, requires_grad), tensor in zip(
            self._requires_grad.items(), self._kept.grad_fn.saved_tensors, strict=True
        ):
            found[place] = tensor.detach().requires_grad_(requires_grad)
        return found


class _Keep(torch.autograd.Function):
    """Keeps its inputs. Its result is empty."""

    @staticmethod
    def forward(ctx: Any, mark: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return mark.new_empty(0)

    @staticmethod
    def backward(*_: Any) -> Any:
        raise AssertionError("the empty result has no gradient")
