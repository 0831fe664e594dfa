"""What a training step truly keeps: live activation storages, parameters excluded, and the process's peak memory.

A saved-tensor hook alone under-reports: what a checkpointed block takes by keyword, or a custom function holds as an
attribute, never reaches it.
The meter therefore watches every storage an operation returns while the step runs, and adds what the hook sees beyond
those (inputs made before the step).
"""

import resource
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageMeter", "peak_rss", "reset_peak_rss"]


class StorageMeter(TorchDispatchMode):
    """Bytes of live storages made inside the block: ``bytes`` now, ``peak`` so far.

    Read ``bytes`` after the forward pass, once only the loss is held, for what is kept for the backward pass.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._live: dict[int, int] = {}
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "StorageMeter":
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _pack(self, tensor: Tensor) -> Tensor:
        self._see(tensor)
        return tensor

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._excluded:
            return
        self._live[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.bytes -= self._live.pop(key, 0)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_rss() -> None:
    """Start a new high-water mark for this process, where the system allows it (Linux)."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def peak_rss() -> int:
    """Bytes of the process's high-water mark since the last reset, or since its start."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
