"""Check a codec of messages on tiny tensors."""

from collections.abc import Iterator

import torch

from fedtune.errors import ClientUpdateError
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.wire.codecs import Codec, EntropyCoder, Shape, count_coded_bytes, decode_values, encode_values

__all__ = ["check_codec"]

_SHAPES = ((6, 50), (5,), (), (4, 3, 2, 2), (0, 3))


def check_codec(name: str) -> Iterator[CheckResult]:
    """Check what a codec makes of tensors of several shapes, or an entropy coder of bytes."""
    codec = build_unit("fedtune.wire.codecs", Unit(name=name), "codec")
    if isinstance(codec, EntropyCoder):
        for size in (0, 1, 5000):
            yield run_check(f"codes {size} bytes", lambda size=size: _check_bytes(codec, size))  # type: ignore[misc]
        return
    for shape in _SHAPES:
        what = f"codes a tensor of shape {list(shape)}"
        yield run_check(what, lambda shape=shape: _check_tensor(codec, shape))  # type: ignore[misc]


def _check_tensor(codec: Codec, shape: Shape) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = tensor.clone()
    first, second = (encode_values([codec], tensor, 7) for _ in range(2))
    decoded = decode_values([codec], first, shape, 7)
    require(first == second, "the same seed gives other bytes")
    require(len(first) == count_coded_bytes([codec], shape), "its layout tells another number of bytes")
    require(torch.equal(tensor, before), "the codec changes its input")
    require(decoded.shape == tensor.shape and decoded.dtype == torch.float32, "it decodes to another form")
    lost = float((decoded - tensor).norm())
    require(not codec.is_contraction or lost <= float(tensor.norm()), "it loses more than the tensor is long")


def _check_bytes(coder: EntropyCoder, size: int) -> None:
    content = bytes(number % 7 for number in range(size))
    coded = coder.compress(content)
    require(coder.decompress(coded, size) == content, "it loses bytes")
    require(len(coded) <= coder.get_most_bytes(size), "the message is longer than its bound")
    for wrong in (size + 1, max(0, size - 1) if size else 2):
        try:
            coder.decompress(coded, wrong)
        except ClientUpdateError:
            continue
        require(False, f"it takes a message of {size} bytes for one of {wrong}")
