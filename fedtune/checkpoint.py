"""Checkpoints of the shared state: one safetensors file, written atomically, with a digest of its tensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedtune.errors import StoreError
from fedtune.files import replace_file_atomically

__all__ = ["get_memory_path", "hash_tensors", "read_checkpoint", "write_checkpoint"]


def write_checkpoint(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write the state atomically to ``path`` and return its digest."""
    with replace_file_atomically(path) as beside:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside)
    return hash_tensors(state)


def read_checkpoint(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Return the state in a checkpoint; StoreError when it is missing, not safetensors, or has another digest."""
    try:
        state = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise StoreError(f"the checkpoint {path} is missing; resume from another run or start anew") from error
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is not a safetensors checkpoint ({error}); name one that fedtune wrote") from error
    if expected_sha256 is not None and hash_tensors(state) != expected_sha256:
        raise StoreError(f"{path} has changed since it was written (its SHA-256 differs); restore it or start anew")
    return state


def get_memory_path(path: Path) -> Path:
    """Return the file beside a checkpoint that holds what the server remembers of earlier tasks."""
    return path.with_suffix(".memory.safetensors")


def hash_tensors(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of the tensors, in order of their names."""
    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        hasher.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return hasher.hexdigest()
