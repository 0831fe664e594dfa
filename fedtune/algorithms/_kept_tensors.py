"""The trained tensors that an algorithm keeps on the devices, chosen by role or by patterns of names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.techniques import list_head_parameters
from fedtune.wire.client_update import LowRankPair

__all__ = ["KEEP", "Keep", "describe_keep", "select_kept_tensors"]

Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Keep = Pattern | Annotated[list[Pattern], Field(min_length=1, max_length=100)]
"""``head``, ``adapters``, or a pattern of tensor names such as ``classifier.*``; or several of them."""
KEEP = "what stays on the device: head, adapters, or patterns of tensor names such as classifier.*"


def select_kept_tensors(
    name: str, keep: Keep, model: nn.Module, trained: Sequence[str], pairs: Sequence[LowRankPair]
) -> list[str]:
    """Return the names of the trained tensors that a role or pattern of ``keep`` matches, in their order.

    Raise ModelError if a role or pattern matches none of them, or if they are all kept.
    """
    found: set[str] = set()
    for pattern in _list_patterns(keep):
        matched = set(_match(pattern, model, trained, pairs))
        if not matched:
            raise ModelError(
                f"federation.algorithm: {name} keeps {pattern!r}, but the techniques train no such tensor of "
                f"{type(model).__name__}; keep head, adapters, or a pattern of their names, e.g. {_suggest(trained)}"
            )
        found |= matched
    if found.issuperset(trained):
        raise ModelError(
            f"federation.algorithm: {name} keeps all that is trained, so that clients would share nothing; keep less, "
            "or train more than that"
        )
    return [one for one in trained if one in found]


def _list_patterns(keep: Keep) -> list[str]:
    """Return the roles and patterns as a list."""
    return [keep] if isinstance(keep, str) else keep


def describe_keep(keep: Keep) -> str:
    """Return the beginning of a sentence about the kept tensors."""
    found = _list_patterns(keep)
    return {"head": "The head has", "adapters": "The adapters have"}.get(
        " ".join(found), f"The tensors {', '.join(found)} have"
    )


def _match(pattern: str, model: nn.Module, trained: Sequence[str], pairs: Sequence[LowRankPair]) -> list[str]:
    if pattern == "head":
        return sorted({*trained} & {*list_head_parameters(model)})
    if pattern == "adapters":
        return sorted({*trained} & {name for pair in pairs for name in (pair.left, pair.right)})
    return [name for name in trained if fnmatchcase(name, pattern)]


def _suggest(trained: Sequence[str]) -> str:
    return f"{trained[-1].rpartition('.')[0]}.*"
