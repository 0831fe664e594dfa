"""Keep the input of chosen layers in a packed form. All else that these layers save is kept as it is.

Only the input is packed: masks, indices, statistics and weights that the same layer saves must stay exact.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedtune.techniques._codecs.saved_tensors import PackedOnce, SharedPackings, UnchangedTensor

__all__ = ["InputCodec", "attach_codec", "detach_codecs", "has_codec"]


class InputCodec(Protocol):
    """How the input of a layer is kept, if it has at least ``least_bytes``. Codecs with equal fields are equal."""

    @property
    def least_bytes(self) -> int:
        """Smaller inputs are kept as they are."""

    def accepts(self, x: Tensor) -> bool:
        """Return whether an input of this shape can be packed."""

    def pack(self, x: Tensor) -> Any:
        """Return the packed form."""

    def unpack(self, packed: Any) -> Tensor:
        """Return the input, or what is left of it, with its shape, type and strides."""


class _Input(NamedTuple):
    """Where the input of a call lies. The input itself is not held, so that it can be freed."""

    address: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def describe_tensor(cls, x: Tensor) -> "_Input":
        return cls(x.untyped_storage()._cdata, int(x.storage_offset()), tuple(x.shape), x.stride())

    def find_in(self, tensor: Tensor) -> Tensor | None:
        """Return the input if ``tensor`` is all of it, perhaps in another shape; None if it is something else."""
        same_start = tensor.untyped_storage()._cdata == self.address and tensor.storage_offset() == self.offset
        if not same_start or tensor.numel() != torch.Size(self.shape).numel():
            return None
        view = tensor.as_strided(self.shape, self.strides)
        as_it_was = (tuple(tensor.shape), tensor.stride()) == (self.shape, self.strides)
        return view if as_it_was or (tensor.is_contiguous() and view.is_contiguous()) else None


class _Saved(NamedTuple):
    """A saved form of an input: its packed form, and its own shape."""

    packed: PackedOnce
    codec: InputCodec
    shape: tuple[int, ...]


def attach_codec(layer: nn.Module, codec: InputCodec, shared: SharedPackings) -> None:
    """Let a layer keep its input by a codec while it trains. Layers with the same input share what is kept of it."""
    vars(layer)["forward"] = partial(_run, layer, codec, shared)


def has_codec(layer: nn.Module) -> bool:
    """Return whether a layer keeps its input by a codec."""
    return getattr(vars(layer).get("forward"), "func", None) is _run


def detach_codecs(model: nn.Module) -> None:
    """Restore the layers' own ``forward``."""
    for layer in model.modules():
        if has_codec(layer):
            del vars(layer)["forward"]


def _run(layer: nn.Module, codec: InputCodec, shared: SharedPackings, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    run = partial(type(layer).forward, layer, x, *args, **kwargs)
    if not (layer.training and torch.is_grad_enabled() and _can_pack(x, codec)):
        return run()
    with saved_tensors_hooks(partial(_pack, codec, shared, _Input.describe_tensor(x)), _unpack):
        return run()


def _can_pack(x: Tensor, codec: InputCodec) -> bool:
    """Return whether the input is large and known. Only real numbers without gaps or repetitions are packed."""
    if x.layout is not torch.strided or not x.is_floating_point():
        return False
    if not x.numel() or x.numel() * x.element_size() < codec.least_bytes:
        return False
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and codec.accepts(x)


def _pack(codec: InputCodec, shared: SharedPackings, given: _Input, tensor: Tensor) -> UnchangedTensor | _Saved:
    x = given.find_in(tensor) if tensor.layout is torch.strided and not isinstance(tensor, nn.Parameter) else None
    if x is None:
        return UnchangedTensor.keep(tensor)
    key = (given, x.dtype, tensor._version, codec)
    packed = shared.pack(tensor.untyped_storage(), key, partial(codec.pack, x))
    return _Saved(packed, codec, tuple(tensor.shape))


def _unpack(saved: UnchangedTensor | _Saved) -> Tensor:
    if isinstance(saved, UnchangedTensor):
        return saved.read()
    made = saved.codec.unpack(saved.packed.content)
    return made if tuple(made.shape) == saved.shape else made.view(saved.shape)
