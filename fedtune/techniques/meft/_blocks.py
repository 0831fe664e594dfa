"""Find a model's stack of transformer blocks and the parts of each block, by structure.

A block is recorded while it runs once. Two normalisations of the width of the stream separate the attention part from
the feed-forward part. Both parts together must compute the same as the block, dropout included; otherwise the block is
refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, fork_random_state
from fedtune.errors import ModelError
from fedtune.techniques.meft._halves import (
    BlockArguments,
    BlockParts,
    bind_block_arguments,
    drop_cache_arguments,
    run_attention_half,
    run_feed_forward_half,
)

__all__ = [
    "UNRUN",
    "BlockInputs",
    "find_block_list",
    "record_block_inputs",
    "split_block",
    "summarise_error",
    "use_seeded_train_mode",
]

UNRUN = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise when they, or parts of them, are run otherwise than they were made for."""

BlockInputs = tuple[Tensor, list[BlockArguments]]
"""What the first block of a stack is given, and what each block is called with beside it."""


def find_block_list(model: nn.Module) -> str:
    """The name of the list of equal blocks that has most of the model's parameters."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    name = max(sizes, key=lambda found: sizes[found], default="")
    if not sizes.get(name):
        raise ModelError(f"{type(model).__name__} has no stack of like blocks to make reversible; leave meft out")
    return name


def record_block_inputs(model: nn.Module, stack: str) -> BlockInputs:
    """Run the backbone on random inputs and record the inputs of its blocks; ModelError if it cannot run."""
    blocks = list(model.get_submodule(stack).children())
    seen: list[tuple[Tensor, BlockArguments, Tensor]] = []
    hooks = [block.register_forward_hook(partial(_record_call, seen), with_kwargs=True) for block in blocks]
    _refuse_random_depth(model)
    try:
        with use_seeded_train_mode(model):
            getattr(model, "base_model", model)(**_inputs(model))
    except UNRUN as error:
        raise ModelError(
            f"{type(model).__name__} cannot be tried out by meft ({summarise_error(error)}); leave meft out"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(blocks):
        raise ModelError(f"{type(model).__name__} does not run each block of {stack} once; leave meft out")
    for (_, _, out), (hidden, _, _) in pairwise(seen):
        if isinstance(out, Tensor) and out is not hidden:
            raise ModelError(f"{type(model).__name__} changes its stream between the blocks of {stack}; leave meft out")
    return seen[0][0], [call for _, call, _ in seen]


def _record_call(
    seen: list[tuple[Tensor, BlockArguments, Tensor]],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Tensor,
) -> None:
    hidden, call = bind_block_arguments(block, args, kwargs)
    seen.append((hidden, drop_cache_arguments(call), out))


def _refuse_random_depth(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "layerdrop", 0.0) > 0:
            raise ModelError(f"{type(module).__name__} skips blocks at random; set layerdrop to 0 or leave meft out")


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two random texts of sixteen tokens, or two random images."""
    able: Any = model
    random = torch.Generator().manual_seed(0)
    if able.main_input_name == "pixel_values":
        size = able.config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.randn(2, able.config.num_channels, *sides, generator=random)
        return {"pixel_values": pixels.to(next(model.parameters()))}
    vocabulary: int = able.get_input_embeddings().num_embeddings
    return {"input_ids": torch.randint(vocabulary, (2, 16), generator=random).to(find_device(model))}


def split_block(name: str, block: nn.Module, hidden: Tensor, call: BlockArguments) -> BlockParts:
    """The parts of a block, which is run on ``hidden`` and ``call``; ModelError if the block does not fit."""
    try:
        ran, wanted = _trace_block(block, list(_list_block_modules(block, hidden.shape[-1])), hidden, call)
        parts = _parse_block(block, ran, hidden.shape[-1])
        if isinstance(parts, str):
            raise _unsupported_block(name, block, parts)
        with use_seeded_train_mode(block):
            found = run_feed_forward_half(block, parts, run_attention_half(block, parts, hidden, call))
    except UNRUN as error:
        raise _unsupported_block(name, block, f"cannot be run half by half ({summarise_error(error)})") from error
    if not _is_close(found, wanted):
        raise _unsupported_block(name, block, "combines attention and feed-forward part in another way")
    return parts


def _unsupported_block(name: str, block: nn.Module, why: str) -> ModelError:
    return ModelError(f"meft does not fit: {name} ({type(block).__name__}) {why}; take gradient-checkpointing instead")


def summarise_error(error: BaseException) -> str:
    """The first line of an error message."""
    return " ".join(str(error).split("\n")[0].split()).rstrip(".:") or type(error).__name__


def _list_block_modules(module: nn.Module, width: int, prefix: str = "") -> Iterator[str]:
    """Names of the modules a block consists of: normalisations of the stream, and what holds none."""
    for name, child in module.named_children():
        if _is_norm(child, width) or not any(_is_norm(inner, width) for inner in child.modules()):
            yield f"{prefix}{name}"
        else:
            yield from _list_block_modules(child, width, f"{prefix}{name}.")


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,)


def _trace_block(block: nn.Module, pieces: list[str], hidden: Tensor, call: BlockArguments) -> tuple[list[str], Any]:
    """The pieces in the order they ran, and what the block gave."""
    ran: list[str] = []
    hooks = [block.get_submodule(name).register_forward_hook(partial(_append, ran, name)) for name in pieces]
    try:
        with use_seeded_train_mode(block):
            return ran, block(hidden, **call)
    finally:
        for hook in hooks:
            hook.remove()


def _append(ran: list[str], name: str, *_: Any) -> None:
    ran.append(name)


@contextmanager
def use_seeded_train_mode(module: nn.Module) -> Iterator[None]:
    """Run the block without gradients and with dropout, always with the same seed.

    In evaluation mode, four-bit layers would repack their weights, which no gradient can pass afterwards.
    """
    before = module.training
    module.train()
    try:
        with torch.no_grad(), fork_random_state(find_device(module)):
            torch.manual_seed(0)
            yield
    finally:
        module.train(before)


def _parse_block(block: nn.Module, ran: list[str], width: int) -> BlockParts | str:
    """The parts, from the order of the modules, or the reason why the block does not fit."""
    norms = [at for at, name in enumerate(ran) if _is_norm(block.get_submodule(name), width)]
    if len(norms) != 2:
        return f"normalises its stream in {len(norms)} places, not in two"
    first, second = norms
    pre = first == 0
    attend = ran[1:second] if pre else ran[:first]
    feed = ran[second + 1 :] if pre else ran[first + 1 : second]
    if not attend or not feed or (not pre and second != len(ran) - 1):
        return f"runs {', '.join(ran)} in that order, which is neither pre-norm nor post-norm"
    dropout = getattr(block, "dropout", 0.0)
    own = float(dropout) if isinstance(dropout, float | int) else 0.0
    return BlockParts(pre, (ran[first], ran[second]), tuple(attend), tuple(feed), own)


def _is_close(found: Any, wanted: Any) -> bool:
    """Whether two tensors are equal up to the order of additions."""
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= 64 * torch.finfo(wanted.dtype).eps * wanted.abs().max())
