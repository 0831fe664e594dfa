"""Serialises tensors as one safetensors payload, holding only one copy of them.

The format is eight bytes with the length of the header, the header (JSON: dtype, shape and offsets of each tensor), and
the bytes of the tensors without gaps. ``save`` of the safetensors library holds two copies of all tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["iter_packed", "pack", "packed_size"]

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
    """Return the tensors as safetensors. Every dtype, including bfloat16, keeps its bits.

    Tensors with the widest elements come first, so that each tensor is aligned to its element size. Raises KeyError for
    an unsupported dtype.
    """
    ordered = _ordered(tensors)
    return b"".join([_beginning(ordered), *(_bytes(tensor) for _, tensor in ordered)])


def iter_packed(tensors: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the pieces of ``pack``. Tensors without data (``meta``) are made one by one, when their turn comes."""
    ordered = _ordered(tensors)
    yield _beginning(ordered)
    for name, tensor in ordered:
        yield _bytes(make(name) if tensor.is_meta else tensor)


def packed_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of bytes that ``pack`` would produce."""
    ordered = _ordered(tensors)
    return len(_beginning(ordered)) + sum(tensor.nbytes for _, tensor in ordered)


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _beginning(ordered: Sequence[tuple[str, Tensor]]) -> bytes:
    """Return the length of the header and the header."""
    header, end = dict[str, object](), 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Return a view of the tensor's memory in the order of its elements."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
