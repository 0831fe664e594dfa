"""The two halves of a transformer block, composed of its own modules, and the adapters of MEFT.

Exported models include a copy of this file, so it imports nothing else of fedtune.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

__all__ = [
    "BlockArguments",
    "BlockParts",
    "BottleneckAdapter",
    "bind_block_arguments",
    "drop_cache_arguments",
    "run_attention_half",
    "run_feed_forward_half",
    "run_stream_adapter",
    "select_batch_rows",
]

BlockArguments = Mapping[str, Any]
"""What a block is called with beside the hidden states, by name."""


@dataclass(frozen=True)
class BlockParts:
    """How a block computes: names of the modules inside it, in the order they run.

    pre-norm:  m = x + attend(norm1(x)),  y = m + feed(norm2(m));
    post-norm: m = norm1(x + attend(x)),  y = norm2(m + feed(m)).
    """

    is_pre_norm: bool
    norms: tuple[str, str]
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    dropout: float = 0.0
    """Applied by the block itself behind ``attend`` and ``feed``."""


class BottleneckAdapter(nn.Module):
    """A bottleneck beside the frozen layers: down, the block's own activation, dropout, up; no residual inside.

    Its matrices are plain parameters, so that no other code takes them for layers of the block.
    """

    def __init__(self, width: int, rank: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        made = partial(torch.empty, dtype=dtype)
        self.down_weight = nn.Parameter(made(rank, width))
        self.down_bias = nn.Parameter(made(rank))
        self.up_weight = nn.Parameter(made(width, rank))
        self.up_bias = nn.Parameter(made(width))
        self.dropout = dropout

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., width] -> [..., width]."""
        inner = activation(F.linear(x, self.down_weight, self.down_bias))
        inner = F.dropout(inner, self.dropout, self.training)
        return F.linear(inner, self.up_weight, self.up_bias)


def bind_block_arguments(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, BlockArguments]:
    """The hidden states that a block was called with, and all other arguments by name."""
    signature = inspect.signature(type(block).forward)
    (_, _), (_, hidden), *others = signature.bind(block, *args, **kwargs).arguments.items()
    call: dict[str, Any] = {}
    for name, value in others:
        call |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return hidden, call


_CACHE = ("past_key_values", "cache", "use_cache")
"""Names of a block's arguments; transformers before 5.24 says ``past_key_values`` where later ones say ``cache``."""


def drop_cache_arguments(call: BlockArguments) -> BlockArguments:
    """The arguments without a cache of keys and values, because a block that runs twice must not add them twice."""
    return {**call, **{name: None for name in _CACHE if name in call}}


def select_batch_rows(call: BlockArguments, rows: int, start: int, count: int) -> BlockArguments:
    """The arguments for some rows of the batch; arguments without a batch dimension stay as they are."""
    narrow = partial(_narrow, rows=rows, start=start, count=count)
    narrowed: BlockArguments = tree_map_only(Tensor, narrow, dict(call))
    return narrowed


def _narrow(tensor: Tensor, rows: int, start: int, count: int) -> Tensor:
    return tensor.narrow(0, start, count) if tensor.ndim > 1 and len(tensor) == rows else tensor


def run_attention_half(block: nn.Module, parts: BlockParts, x: Tensor, call: BlockArguments) -> Tensor:
    """x + attend(norm1(x)), or norm1(x + attend(x)); an adapter stands in line behind ``attend``."""
    norm = block.get_submodule(parts.norms[0])
    first, *others = (block.get_submodule(name) for name in parts.attention)
    inner = first(norm(x) if parts.is_pre_norm else x, **_select_attention_arguments(first, call))
    inner = inner[0] if isinstance(inner, tuple) else inner
    inner = F.dropout(_chain(others, inner), parts.dropout, block.training)
    if "attention" in _adapters(block):
        inner = inner + _adapters(block)["attention"](inner, _activation(block, parts))
    out: Tensor = x + inner if parts.is_pre_norm else norm(x + inner)
    return out


def run_feed_forward_half(block: nn.Module, parts: BlockParts, m: Tensor) -> Tensor:
    """m + feed(norm2(m)), or norm2(m + feed(m)); an adapter stands beside ``feed``."""
    norm = block.get_submodule(parts.norms[1])
    inner = norm(m) if parts.is_pre_norm else m
    fed = _chain((block.get_submodule(name) for name in parts.feed_forward), inner)
    fed = F.dropout(fed, parts.dropout, block.training)
    if "feed" in _adapters(block):
        fed = fed + _adapters(block)["feed"](inner, _activation(block, parts))
    out: Tensor = m + fed if parts.is_pre_norm else norm(m + fed)
    return out


def run_stream_adapter(block: nn.Module, parts: BlockParts, x: Tensor) -> Tensor:
    """The adapter that stands alone in the other stream."""
    out: Tensor = _adapters(block)["stream"](x, _activation(block, parts))
    return out


def _activation(block: nn.Module, parts: BlockParts) -> Callable[[Tensor], Tensor]:
    """The function between the layers of ``feed``, without its hooks; GELU where it is no module."""
    fed = (module for name in parts.feed_forward for module in block.get_submodule(name).modules())
    return next((module.forward for module in fed if _is_function(module)), F.gelu)


def _is_function(module: nn.Module) -> bool:
    bare = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
    runs = type(module).forward is not nn.Module.forward
    return bare and runs and not isinstance(module, nn.Dropout | nn.Identity)


def _adapters(block: nn.Module) -> Mapping[str, nn.Module]:
    found: Any = block._modules.get("adapters")
    return {} if found is None else found


def _chain(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _select_attention_arguments(attention: nn.Module, call: BlockArguments) -> BlockArguments:
    """What an attention module takes of a block's call: all it names, and more if it takes anything by name."""
    names, anything = _list_parameter_names(type(attention).forward)
    return {name: value for name, value in call.items() if name in names or (anything and value is not None)}


@cache
def _list_parameter_names(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(forward).parameters.values()
    return frozenset(one.name for one in parameters), any(one.kind is one.VAR_KEYWORD for one in parameters)
