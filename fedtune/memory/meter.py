"""Measure the memory that tensors of a training step occupy, counting each storage once.

The meter counts a storage from its creation until it is freed. It sees what saved-tensor hooks miss: keyword arguments
of checkpointed blocks and attributes of custom functions. A hook adds tensors that existed before the step and that
autograd keeps, such as a batch.

Tensors that the caller excludes, usually parameters and buffers, are not counted. Their gradients are reported
separately as ``gradient_bytes``. A gradient that reaches its parameter is left out of the peak since its creation. So
are the tensors it was summed from; a weight that is used twice has two.

Memory that an operation uses internally is not counted; the peak of the process includes it. The peak is an upper
bound: autograd adds gradients in place, but not while operations are observed. Where two gradients of one tensor are
added, a third one then exists for a short time.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageMeter"]


@dataclass(slots=True)
class _Storage:
    """A live storage. ``number`` is never reused, unlike an address."""

    number: int
    size: int
    counted: bool
    in_backward: bool


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of live storages created inside the block.

    ``current_bytes`` is the present size, ``peak_bytes`` the largest so far, ``gradient_bytes`` the present size of
    parameter gradients. Read ``current_bytes`` after the forward pass, while only the loss is referenced, to get the
    activation memory kept for backward.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._excluded = list(excluded)
        self._not_ours = {(held := tensor.untyped_storage())._cdata: held for tensor in _dense(self._excluded)}
        self._numbers = count()
        self._live: dict[int, _Storage] = {}
        self._changes: list[tuple[int, int]] = []  # (storage number, change in bytes), in order
        self._arrived: set[int] = set()  # numbers of parameter gradients
        self._parts: dict[int, set[int]] = {}  # the terms of each sum made in the backward pass
        self._block = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here. True would make torch import its compiler: a second and 70 MB per process."""
        return False

    @property
    def current_bytes(self) -> int:
        """The bytes held now, without gradients of excluded parameters."""
        gradients = self._gradients()
        return sum(one.size for one in self._live.values() if one.number not in gradients)

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes held at one time, without gradients of excluded parameters."""
        gradients = self._gradients()
        return max(accumulate((change for number, change in self._changes if number not in gradients), initial=0))

    @property
    def peak_with_gradients(self) -> int:
        """The largest number of bytes held at one time, with gradients of excluded parameters."""
        return max(accumulate((change for _, change in self._changes), initial=0))

    @property
    def gradient_bytes(self) -> int:
        """The bytes held now by gradients of excluded parameters, if they were created in the block."""
        gradients = self._gradients()
        return sum(one.size for one in self._live.values() if one.number in gradients)

    def __enter__(self) -> "StorageMeter":
        self._block.enter_context(_watch_resizes(self._meet))
        self._block.enter_context(saved_tensors_hooks(self._pack, _unpack))
        for tensor in self._excluded:
            if tensor.requires_grad and tensor.is_leaf:  # it may be freed before it is read
                self._block.callback(tensor.register_post_accumulate_grad_hook(self._note_gradient).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._note_gradients()
        self._excluded.clear()
        self._not_ours.clear()
        self._block.close()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        fresh = func is torch.ops.aten.lift_fresh.default  # its input was just created by torch.tensor
        taken = [] if fresh else [self._meet(tensor.untyped_storage(), made=False) for tensor in _dense((args, kwargs))]
        out = func(*args, **(kwargs or {}))
        given = [self._meet(tensor.untyped_storage(), made=True) for tensor in _dense(out)]
        if func in _SUMS and given:
            self._parts.setdefault(given[0].number, set()).update(one.number for one in taken if one.in_backward)
        return out

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._meet(storage, made=True)
            self._live[storage._cdata].counted |= storage._cdata not in self._not_ours
            self._measure(storage)
        return tensor

    def _meet(self, storage: UntypedStorage, made: bool) -> _Storage:
        """Register a storage that an operation reads or returns. An unknown one is new, or existed before the block."""
        key = storage._cdata
        if key not in self._live:
            counted = made and key not in self._not_ours
            in_backward = torch._C._current_graph_task_id() != -1
            self._live[key] = _Storage(next(self._numbers), 0, counted, in_backward)
            weakref.finalize(storage, _drop, weakref.ref(self), key).atexit = False  # it may outlive the meter
        self._measure(storage)
        return self._live[key]

    def _measure(self, storage: UntypedStorage) -> None:
        """Update the size of a storage. Storages can be resized, even to zero, and filled again."""
        known = self._live[storage._cdata]
        size = storage.nbytes() if known.counted else 0
        if size != known.size:
            self._changes.append((known.number, size - known.size))
            known.size = size

    def _drop(self, key: int) -> None:
        gone = self._live.pop(key)
        self._changes.append((gone.number, -gone.size))

    def _gradients(self) -> set[int]:
        """Return the numbers of the parameter gradients and of the tensors they were summed from."""
        self._note_gradients()
        found: set[int] = set()
        waiting = set(self._arrived)
        while waiting:
            found |= waiting
            waiting = {part for number in waiting for part in self._parts.get(number, ())} - found
        return found

    def _note_gradients(self) -> None:
        for tensor in self._excluded:
            self._note_gradient(tensor)

    def _note_gradient(self, parameter: Tensor) -> None:
        """Record a parameter's gradient.

        Tensors kept from the forward pass stay counted even if they become a gradient.
        """
        gradient = parameter.grad if parameter.is_leaf else None
        if gradient is not None and gradient.layout is torch.strided:
            known = self._live.get(gradient.untyped_storage()._cdata)
            if known is not None and known.in_backward:
                self._arrived.add(known.number)


def _dense(values: Any) -> Iterator[Tensor]:
    """Return the tensors with a storage among nested values."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)


_SUMS = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.clone.default,
    torch.ops.aten.copy_.default,
}
"""The operations by which autograd accumulates a parameter's gradient."""


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _watch_resizes(meet: Callable[[UntypedStorage, bool], object]) -> Iterator[None]:
    """Report storages that are resized directly, as reversible layers do. No operation shows such a change."""
    plain = UntypedStorage.resize_

    def resize(storage: UntypedStorage, size: int) -> Any:
        out = plain(storage, size)
        meet(storage, False)
        return out

    UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        UntypedStorage.resize_ = plain  # type: ignore[method-assign]


def _drop(meter: "weakref.ref[StorageMeter]", key: int) -> None:
    """Tell a meter that is still there that a storage was freed."""
    if (found := meter()) is not None:
        found._drop(key)
