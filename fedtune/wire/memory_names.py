"""The names of the tensors that a server remembers of earlier tasks, where they travel beside the shared state."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["add_memory", "is_memory", "split_memory"]

_PREFIX = "memory:"


def add_memory(state: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state with the server's memory beside it; the state itself if there is none."""
    if not memory:
        return state
    return {**state, **{f"{_PREFIX}{name}": tensor for name, tensor in memory.items()}}


def split_memory(sent: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """Return the state and the memory of ``add_memory``."""
    memory = {name.removeprefix(_PREFIX): sent[name] for name in sent if name.startswith(_PREFIX)}
    return ({name: sent[name] for name in sent if not name.startswith(_PREFIX)} if memory else sent), memory


def is_memory(name: str) -> bool:
    """Whether a tensor that a client receives is of the server's memory."""
    return name.startswith(_PREFIX)
