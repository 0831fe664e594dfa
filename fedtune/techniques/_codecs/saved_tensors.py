"""What saved-tensor hooks must take care of: tensors that are kept as they are, and tensors that are saved twice.

Autograd calls the innermost hooks only, and it does not notice that a tensor was written to after hooks kept it.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage

__all__ = ["PackedOnce", "SharedPackings", "UnchangedTensor"]


class UnchangedTensor(NamedTuple):
    """A tensor that is kept as it is. Its version tells whether it was written to since."""

    tensor: Tensor
    version: int

    @classmethod
    def keep(cls, tensor: Tensor) -> "UnchangedTensor":
        """Keep a tensor, without a copy."""
        return cls(tensor, tensor._version)

    def read(self) -> Tensor:
        """Return the tensor. Raise RuntimeError if it was changed in place, as autograd does without hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that backward needs was changed in place: it is at version "
                f"{self.tensor._version}, and version {self.version} was kept; change a copy instead"
            )
        return self.tensor


class PackedOnce:
    """The packed form of a tensor, which several saved tensors may share."""

    __slots__ = ("__weakref__", "content")

    def __init__(self, content: Any) -> None:
        self.content = content


class _Known(NamedTuple):
    storage: weakref.ref[UntypedStorage]
    packed: weakref.ref[PackedOnce]


class SharedPackings:
    """Packs each state of a tensor once, while the tensor and its packed form live. Neither is kept alive here."""

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedPackings, ()

    def pack(self, storage: UntypedStorage, key: Any, make: Callable[[], Any]) -> PackedOnce:
        """Return the packed form known for ``storage`` and ``key``, or that of ``make``.

        The key tells apart versions and views. An address is used again after a storage is freed, so the storage
        itself must be the same.
        """
        address = (storage._cdata, key)
        known = self._known.get(address)
        packed = None if known is None or known.storage() is not storage else known.packed()
        if packed is None:
            packed = PackedOnce(make())
            self._known[address] = _Known(weakref.ref(storage), weakref.ref(packed, self._make_forget(address)))
        return packed

    def _make_forget(self, address: Any) -> Callable[[weakref.ref[PackedOnce]], None]:
        def forget(gone: weakref.ref[PackedOnce]) -> None:
            known = self._known.get(address)
            if known is not None and known.packed is gone:
                del self._known[address]

        return forget
