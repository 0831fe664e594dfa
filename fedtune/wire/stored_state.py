"""A shared state that stays on disk: each tensor is mapped when it is looked up and let go of after use."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import StoreError

__all__ = ["StoredState"]


class StoredState(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, in the file's order; StoreError when it cannot be read.

    The pages are the file's own, so that the system can drop them when memory is short. What is looked up must not be
    written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self._names = dict.fromkeys(file.keys())
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{path} is not a safetensors checkpoint ({error}); name one that fedtune wrote"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
