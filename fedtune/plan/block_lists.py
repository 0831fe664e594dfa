"""Find the list of like blocks that makes up most of a model, and shorten it.

What a step keeps grows by the same bytes with each block, so two short models tell what a long one keeps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

__all__ = ["FEWEST_BLOCKS", "BlockList", "find_like_blocks", "truncate_blocks"]

_Of = TypeVar("_Of")

FEWEST_BLOCKS = 2
"""The number of blocks of the shorter model: the first and the last one, which may differ from those between them."""


@dataclass(frozen=True)
class BlockList:
    """The name of the list and the number of its blocks before it was shortened."""

    name: str
    count: int

    def expand_names(self, values: Mapping[str, _Of]) -> dict[str, _Of]:
        """Return the entries of all blocks from those of the blocks that are left.

        The last one stands for the last of all, since some techniques treat it differently. The one before it stands
        for those that were removed.
        """
        last = max((self._number(name) for name in values), default=-1)
        found = {name: value for name, value in values.items() if self._number(name) != last or last < 0}
        inner = dict.fromkeys(range(last, self.count - 1), last - 1)
        for number, template in {**inner, self.count - 1: last}.items() if last >= 0 else ():
            start, own = f"{self.name}.{template}.", f"{self.name}.{number}."
            found |= {own + name[len(start) :]: value for name, value in values.items() if name.startswith(start)}
        return found

    def expand_all(self, names: Iterable[str]) -> list[str]:
        """Return the names with those of the removed blocks."""
        return list(self.expand_names(dict.fromkeys(names)))

    def _number(self, name: str) -> int:
        start = f"{self.name}."
        number = name[len(start) :].partition(".")[0] if name.startswith(start) else ""
        return int(number) if number.isdigit() else -1


def find_like_blocks(model: nn.Module) -> BlockList | None:
    """Return the list with most parameters if all its blocks are alike; the first may differ. Otherwise None."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    name = max(sizes, key=lambda found: sizes[found], default="")
    if not sizes.get(name):
        return None
    blocks = list(model.get_submodule(name).children())[1:]
    kinds = [_describe(block) for block in blocks]
    own = {key for key in kinds[0] if all(kind.get(key) == at for at, kind in enumerate(kinds, 1))} if blocks else set()
    alike = all(_leave_out(kind, own) == _leave_out(kinds[0], own) for kind in kinds)
    return BlockList(name, len(blocks) + 1) if blocks and alike else None


def truncate_blocks(model: nn.Module, blocks: BlockList, depth: int) -> None:
    """Keep the first ``depth`` blocks of the list."""
    found: Any = model.get_submodule(blocks.name)
    del found[depth:]


def _describe(block: nn.Module) -> dict[tuple[str, str], object]:
    """Return all that decides what a block computes: its layers, their sizes and their plain settings."""
    found: dict[tuple[str, str], object] = {}
    for name, module in block.named_modules():
        found[name, "type"] = type(module)
        found |= {(name, key): value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
        found |= {(name, key): (one.shape, one.dtype) for key, one in module.named_parameters(recurse=False)}
    return found


_PLAIN = bool | int | float | str


def _leave_out(kind: Mapping[tuple[str, str], object], own: Iterable[tuple[str, str]]) -> dict[tuple[str, str], object]:
    """Return a description without a block's own place in the list."""
    return {key: value for key, value in kind.items() if key not in set(own)}
