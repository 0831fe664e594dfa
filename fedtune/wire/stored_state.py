"""A shared state that stays on disk. Each tensor is memory-mapped when it is read and released after use."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import StoreError

__all__ = ["StoredState"]


class StoredState(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, in the order of the file.

    The system can drop the mapped pages when memory is short. The tensors must not be modified. Raises StoreError when
    the file cannot be read.
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

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
