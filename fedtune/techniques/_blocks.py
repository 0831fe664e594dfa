"""Finding a model's stack of transformer blocks, and the parts of each block, by structure.

A block is watched while it runs once: two normalisations of the stream's width cut what it runs into an attention and a
feed-forward part. Parts put together again must give what the block gives, dropout included, or the block is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.techniques._halves import Call, Parts, attention_half, bound, feed_half, without_cache

__all__ = ["UNRUN", "Run", "find_stack", "in_training", "parts_of", "probe", "said"]

UNRUN = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise when they, or parts of them, are run otherwise than they were made for."""

Run = tuple[Tensor, list[Call]]
"""What the first block of a stack is given, and what each block is called with beside it."""


def find_stack(model: nn.Module) -> str:
    """The name of the list of like blocks that holds most of the model's parameters."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    name = max(sizes, key=lambda found: sizes[found], default="")
    if not sizes.get(name):
        raise ModelError(f"{type(model).__name__} has no stack of like blocks to make reversible; leave meft out")
    return name


def probe(model: nn.Module, stack: str) -> Run:
    """Run the backbone on drawn inputs and note what its blocks are given; ModelError where it cannot be run so."""
    blocks = list(model.get_submodule(stack).children())
    seen: list[tuple[Tensor, Call, Tensor]] = []
    hooks = [block.register_forward_hook(partial(_note, seen), with_kwargs=True) for block in blocks]
    _refuse_random_depth(model)
    try:
        with in_training(model):
            getattr(model, "base_model", model)(**_inputs(model))
    except UNRUN as error:
        raise ModelError(
            f"{type(model).__name__} cannot be tried out by meft ({said(error)}); leave meft out"
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


def _note(
    seen: list[tuple[Tensor, Call, Tensor]],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Tensor,
) -> None:
    hidden, call = bound(block, args, kwargs)
    seen.append((hidden, without_cache(call), out))


def _refuse_random_depth(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "layerdrop", 0.0) > 0:
            raise ModelError(f"{type(module).__name__} skips blocks at random; set layerdrop to 0 or leave meft out")


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two texts of sixteen drawn tokens, or two drawn pictures."""
    able: Any = model
    random = torch.Generator().manual_seed(0)
    if able.main_input_name == "pixel_values":
        size = able.config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.randn(2, able.config.num_channels, *sides, generator=random)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    vocabulary: int = able.get_input_embeddings().num_embeddings
    return {"input_ids": torch.randint(vocabulary, (2, 16), generator=random)}


def parts_of(name: str, block: nn.Module, hidden: Tensor, call: Call) -> Parts:
    """How a block computes; ModelError names it and says what does not fit. It is run on ``hidden`` and ``call``."""
    try:
        ran, wanted = _watched(block, list(_pieces(block, hidden.shape[-1])), hidden, call)
        parts = _grammar(block, ran, hidden.shape[-1])
        if isinstance(parts, str):
            raise _misfit(name, block, parts)
        with in_training(block):
            found = feed_half(block, parts, attention_half(block, parts, hidden, call))
    except UNRUN as error:
        raise _misfit(name, block, f"cannot be run half by half ({said(error)})") from error
    if not _close(found, wanted):
        raise _misfit(name, block, "combines attention and feed-forward part in another way")
    return parts


def _misfit(name: str, block: nn.Module, why: str) -> ModelError:
    return ModelError(f"meft does not fit: {name} ({type(block).__name__}) {why}; take checkpointing instead")


def said(error: BaseException) -> str:
    """An error of a model in a few words."""
    return " ".join(str(error).split("\n")[0].split()).rstrip(".:") or type(error).__name__


def _pieces(module: nn.Module, width: int, prefix: str = "") -> Iterator[str]:
    """Names of the modules a block consists of: normalisations of the stream, and what holds none."""
    for name, child in module.named_children():
        if _is_norm(child, width) or not any(_is_norm(inner, width) for inner in child.modules()):
            yield f"{prefix}{name}"
        else:
            yield from _pieces(child, width, f"{prefix}{name}.")


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,)


def _watched(block: nn.Module, pieces: list[str], hidden: Tensor, call: Call) -> tuple[list[str], Any]:
    """The pieces in the order they ran, and what the block gave."""
    ran: list[str] = []
    hooks = [block.get_submodule(name).register_forward_hook(partial(_append, ran, name)) for name in pieces]
    try:
        with in_training(block):
            return ran, block(hidden, **call)
    finally:
        for hook in hooks:
            hook.remove()


def _append(ran: list[str], name: str, *_: Any) -> None:
    ran.append(name)


@contextmanager
def in_training(module: nn.Module) -> Iterator[None]:
    """Without gradients and with dropout, the same in every such block.

    Not in scoring mode, in which four-bit layers pack their weights beyond the reach of gradients.
    """
    before = module.training
    module.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        module.train(before)


def _grammar(block: nn.Module, ran: list[str], width: int) -> Parts | str:
    """Parts from the order of the pieces, or what is wrong with it."""
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
    return Parts(pre, (ran[first], ran[second]), tuple(attend), tuple(feed), own)


def _close(found: Any, wanted: Any) -> bool:
    """Equal but for the order of additions."""
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        return False
    return float((found - wanted).abs().max()) <= 64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
