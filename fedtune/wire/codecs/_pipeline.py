"""A list of codecs as one: each one goes on with the tensors that the one before has left, and bytes are joined."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.recipe.train_settings import Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.wire.codecs._codec import Codec, CodecKind, EntropyCoder, Shape

__all__ = ["WirePipeline", "build_wire_pipeline", "count_coded_bytes", "decode_values", "encode_values"]

_FP32 = np.dtype("<f4")
_KINDS: dict[CodecKind, str] = {
    "factors": "leaves two thin factors",
    "selects": "leaves a list of values and no matrix",
    "quantises": "has made bytes of all values",
    "compresses": "codes the bytes of the whole message",
}
"""The order of codecs, and what each kind leaves to the next."""


class WirePipeline(NamedTuple):
    """The codecs of tensors in order, and the entropy coder of the message if there is one."""

    codecs: tuple[Codec, ...] = ()
    coder: EntropyCoder | None = None

    @property
    def units(self) -> tuple[Codec | EntropyCoder, ...]:
        """All of them in order."""
        return self.codecs if self.coder is None else (*self.codecs, self.coder)

    def compress(self, content: bytes) -> bytes:
        """Return the message as it is sent."""
        return content if self.coder is None else self.coder.compress(content)

    def decompress(self, content: bytes, size: int) -> bytes:
        """Return the message of ``size`` bytes; ClientUpdateError if it has another size."""
        if self.coder is not None:
            return self.coder.decompress(content, size)
        if len(content) != size:
            raise ClientUpdateError(f"the message has {len(content)} bytes instead of {size}; update the client")
        return content

    def get_most_bytes(self, size: int) -> int:
        """Return the most bytes that a message of ``size`` bytes can take when it is sent."""
        return size if self.coder is None else self.coder.get_most_bytes(size)


def build_wire_pipeline(units: Sequence[Unit], where: str) -> WirePipeline:
    """Return the codecs that a recipe names at the key ``where``.

    Raise RecipeError for an unknown name or setting, and for codecs that do not follow each other.
    """
    found = [build_unit("fedtune.wire.codecs", unit, where) for unit in units]
    for first, second in pairwise(found):
        _check_order(first, second, where)
    coder = found.pop() if found and isinstance(found[-1], EntropyCoder) else None
    return WirePipeline(tuple(found), coder)


def _check_order(first: Codec | EntropyCoder, second: Codec | EntropyCoder, where: str) -> None:
    kinds = list(_KINDS)
    if kinds.index(first.kind) < kinds.index(second.kind):
        return
    mend = "keep one of them" if first.kind == second.kind else f"name {second.name} before {first.name}"
    raise RecipeError(f"{where}: {second.name} cannot follow {first.name}, which {_KINDS[first.kind]}; {mend}")


def count_coded_bytes(codecs: Sequence[Codec], shape: Shape) -> int:
    """Return the bytes of a coded tensor of this shape. What no codec makes bytes of is written as fp32."""
    if not codecs:
        return math.prod(shape) * _FP32.itemsize
    layout = codecs[0].get_layout(shape)
    return layout.num_bytes + sum(count_coded_bytes(codecs[1:], one) for one in layout.shapes)


def encode_values(codecs: Sequence[Codec], tensor: Tensor, seed: int) -> bytes:
    """Return a coded tensor."""
    return b"".join(_iter_coded(codecs, tensor, seed))


def _iter_coded(codecs: Sequence[Codec], tensor: Tensor, seed: int) -> Iterator[bytes]:
    if not codecs:
        yield tensor.detach().numpy().astype(_FP32).tobytes()
        return
    coded = codecs[0].encode(tensor, seed)
    yield coded.content
    for one in coded.tensors:
        yield from _iter_coded(codecs[1:], one, seed)


def decode_values(codecs: Sequence[Codec], content: bytes, shape: Shape, seed: int) -> Tensor:
    """Undo ``encode_values``; ClientUpdateError for content that it never writes, also of another size."""
    if len(content) != count_coded_bytes(codecs, shape):
        raise ClientUpdateError(
            f"a coded tensor has {len(content)} bytes instead of {count_coded_bytes(codecs, shape)}"
        )
    if not codecs:
        return torch.from_numpy(np.frombuffer(content, _FP32).astype(np.float32)).reshape(shape)
    layout = codecs[0].get_layout(shape)
    start, tensors = layout.num_bytes, list[Tensor]()
    for one in layout.shapes:
        stop = start + count_coded_bytes(codecs[1:], one)
        tensors.append(decode_values(codecs[1:], content[start:stop], one, seed))
        start = stop
    return codecs[0].decode(content[: layout.num_bytes], tensors, shape, seed)
