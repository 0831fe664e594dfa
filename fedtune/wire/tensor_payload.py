"""Tensors as one safetensors payload, with no more than one copy of them.

The format is eight bytes with the length of a header, the header (JSON: precision, shape and place of each tensor), and
the tensors' bytes without gaps. The library's own ``save`` holds two copies of all tensors before it returns one.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["pack", "packed_size"]

_CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as safetensors; every precision, bfloat16 too, keeps its bits.

    The widest elements come first, so that each tensor begins at a multiple of its element's size. KeyError for a
    precision that no payload of fedtune's has.
    """
    ordered = _ordered(tensors)
    return b"".join([_beginning(ordered), *(_bytes(tensor) for _, tensor in ordered)])


def packed_size(tensors: Mapping[str, Tensor]) -> int:
    """How many bytes ``pack`` would give."""
    ordered = _ordered(tensors)
    return len(_beginning(ordered)) + sum(tensor.nbytes for _, tensor in ordered)


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _beginning(ordered: Sequence[tuple[str, Tensor]]) -> bytes:
    """The header and its length."""
    header, end = dict[str, object](), 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """A view of the tensor's memory, in the order of its elements."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
