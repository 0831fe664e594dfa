"""Let blocks keep what autograd saves in a file. A storage is written once, however many tensors are views of it."""

import weakref
from collections.abc import Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedtune.techniques._codecs.activation_file import ActivationFile
from fedtune.techniques._codecs.saved_tensors import PackedOnce, SharedPackings, UnchangedTensor

__all__ = ["StorageKeeper", "attach_keeper", "detach_keepers"]


class _Page:
    """The content of a storage in the file; ``slot`` is None if the file took no more."""

    def __init__(self, file: ActivationFile, flat: Tensor) -> None:
        self.device = flat.device
        self.slot = file.write(flat)
        self._file = file
        self._read: weakref.ref[Tensor] | None = None
        if self.slot is not None:
            weakref.finalize(self, file.release, self.slot).atexit = False

    def read(self) -> Tensor:
        """Return the bytes. Views that are needed at the same time share them."""
        found = None if self._read is None else self._read()
        if found is None:
            assert self.slot is not None
            found = self._file.read(self.slot).to(self.device)
            self._read = weakref.ref(found)
        return found


class _View(NamedTuple):
    """A saved tensor as a view of a storage."""

    page: PackedOnce
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class StorageKeeper:
    """Writes storages of at least ``least_bytes``. ``weights`` are the storages that the model holds anyway."""

    def __init__(self, file: ActivationFile, least_bytes: int) -> None:
        self.file, self._least_bytes = file, least_bytes
        self._shared = SharedPackings()
        self._running: list[saved_tensors_hooks] = []
        self.weights: Set[int] = frozenset()

    def begin_block(self, block: nn.Module, _: Any) -> None:
        """Forward pre-hook of a block."""
        if block.training and torch.is_grad_enabled():
            self._running.append(saved_tensors_hooks(self.pack, unpack))
            self._running[-1].__enter__()

    def end_block(self, block: nn.Module, _: Any, __: Any) -> None:
        """Forward hook of a block, called after an error too."""
        if block.training and torch.is_grad_enabled() and self._running:
            self._running.pop().__exit__()

    def pack(self, tensor: Tensor) -> UnchangedTensor | _View:
        """Return a handle of a large activation. Everything else is kept as it is."""
        if not self._is_written(tensor):
            return UnchangedTensor.keep(tensor)
        storage = tensor.untyped_storage()
        page = self._shared.pack(storage, tensor._version, partial(_Page, self.file, _view_whole_storage(tensor)))
        if page.content.slot is None:
            return UnchangedTensor.keep(tensor)
        return _View(page, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _is_written(self, tensor: Tensor) -> bool:
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        is_whole = storage.nbytes() % tensor.element_size() == 0
        return is_whole and storage.nbytes() >= self._least_bytes and storage._cdata not in self.weights


def _view_whole_storage(tensor: Tensor) -> Tensor:
    """Return all bytes of the storage. ``set_`` would keep storages without data alive while a plan is traced."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), 0).view(torch.uint8)


def unpack(saved: UnchangedTensor | _View) -> Tensor:
    """Return the saved tensor with its values, shape and strides."""
    if isinstance(saved, UnchangedTensor):
        return saved.read()
    flat: Tensor = saved.page.content.read()
    return flat.view(saved.dtype).as_strided(saved.shape, saved.strides, saved.offset)


def attach_keeper(block: nn.Module, keeper: StorageKeeper) -> None:
    """Let a block that trains keep activations in the keeper's file, whatever runs in its place."""
    block.register_forward_pre_hook(keeper.begin_block)
    block.register_forward_hook(keeper.end_block, always_call=True)


def detach_keepers(model: nn.Module) -> None:
    """Remove the hooks."""
    for block in model.modules():
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            found = [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), StorageKeeper)]
            for key in found:
                del hooks[key]
                block._forward_hooks_always_called.pop(key, None)
