"""Cache the outputs of frozen modules on disk, one file per example, found by the example's pixels."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedtune.files import write_bytes_atomically
from fedtune.paths import get_cache_folder

__all__ = ["OutputCache"]


class OutputCache:
    """A folder for one network in one precision. A damaged file is ignored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def for_modules(cls, modules: Sequence[nn.Module]) -> Self:
        """The cache for these modules, found by their structure and their weights."""
        tensors = (tensor for module in modules for tensor in module.state_dict().values())
        return cls(get_cache_folder() / "outputs" / _hash_tensors(tensors, repr(modules)))

    def read_output(self, x: Tensor) -> Tensor | None:
        """The cached output for one example's pixels [1, c, h, w], or None."""
        try:
            return safetensors.torch.load(self._path(x).read_bytes())["output"].to(x.device)
        except (OSError, SafetensorError):
            return None

    def write_output(self, x: Tensor, output: Tensor) -> None:
        """Store an example's output; StoreError if the disk is full."""
        write_bytes_atomically(self._path(x), safetensors.torch.save({"output": output.cpu().contiguous()}))

    def _path(self, x: Tensor) -> Path:
        """The name contains the number of threads, or an accelerator's type: both may change the last bit."""
        by = torch.get_num_threads() if x.device.type == "cpu" else x.device.type
        return self.folder / f"{_hash_tensors([x], f'{tuple(x.shape)} {by}')}.safetensors"


def _hash_tensors(tensors: Iterable[Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
