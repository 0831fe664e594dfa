"""Find the blocks that make up most of a model."""

from torch import nn

__all__ = ["find_blocks"]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the list that has most parameters; none if there is no list of two blocks or more."""
    lists = [list(one) for one in model.modules() if isinstance(one, nn.ModuleList | nn.Sequential) and len(one) > 1]
    return max(lists, key=_count_parameters, default=[])


def _count_parameters(blocks: list[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
