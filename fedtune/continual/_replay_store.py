"""The examples that a method keeps on a device for replay, and their form as tensors of the device's memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

__all__ = ["GROUP_BYTES", "ROW_BYTES", "ReplayStore", "read_store", "write_store"]

_KEY_BYTES = 32
ROW_BYTES = 8
"""Bytes of an example beside its content: its size and its group, 4 each."""
GROUP_BYTES = 4 + _KEY_BYTES
"""Bytes of a group of which examples were dropped."""


@dataclass(frozen=True)
class ReplayStore:
    """Stored examples in the order of their keys, with the group of each.

    ``limits`` are those of the last choice, ``budget`` the bytes that the method may store. ``outputs`` [n, classes]
    are what the model said of them when it was trained, if the method keeps that.
    """

    budget: int
    contents: Sequence[bytes] = ()
    groups: Sequence[int] = ()
    limits: Mapping[int, bytes] = field(default_factory=dict)
    outputs: Tensor | None = None


def write_store(store: ReplayStore) -> dict[str, Tensor]:
    """Return a store as tensors."""
    written = {
        "content": _join_bytes(store.contents),
        "sizes": torch.tensor([len(content) for content in store.contents], dtype=torch.int32),
        "groups": torch.tensor(list(store.groups), dtype=torch.int32),
        "limit_groups": torch.tensor(list(store.limits), dtype=torch.int32),
        "limit_keys": _join_bytes(list(store.limits.values())).reshape(-1, _KEY_BYTES),
        "budget": torch.tensor(store.budget),
    }
    return written if store.outputs is None else {**written, "outputs": store.outputs}


def read_store(tensors: Mapping[str, Tensor]) -> ReplayStore:
    """Return the store that ``write_store`` wrote."""
    ends = accumulate(tensors["sizes"].tolist(), initial=0)
    content = bytes(tensors["content"].numpy())
    keys = [bytes(key.numpy()) for key in tensors["limit_keys"]]
    return ReplayStore(
        int(tensors["budget"]),
        [content[start:end] for start, end in pairwise(ends)],
        tensors["groups"].tolist(),
        dict(zip(tensors["limit_groups"].tolist(), keys, strict=True)),
        tensors.get("outputs"),
    )


def _join_bytes(pieces: Sequence[bytes]) -> Tensor:
    joined = bytearray(b"".join(pieces))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0, dtype=torch.uint8)
