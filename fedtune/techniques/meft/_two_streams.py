"""A stack of transformer blocks as two coupled streams: forward pass, inverse and gradients.

Streams x1, x2 [batch, tokens, width] pass a block as
    y1 = lambda x1 + F(x2),   y2 = beta x2 + G(y1)
and come back as
    x2 = (y2 - G(y1)) / beta,   x1 = (y1 - F(x2)) / lambda.

A damped coupling has y1 = lambda (x1 - x2) + F(x2). Exact mode: the streams are double precision, F and G are rounded
to a grid of 2 ** -grid (so is x2 where it damps), lambda and beta are powers of two. Every sum then fits the 53 bits of
a double as long as the streams stay in range, and the inverse gives back the very bits.

Exported models include a copy of this file, so it imports nothing else of fedtune.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._couplings import FULL_LAYER, STAGES, STREAM_ADAPTER, CouplingPlan, Stage, Stages
from ._halves import (
    BlockArguments,
    BottleneckAdapter,
    bind_block_arguments,
    run_attention_half,
    run_feed_forward_half,
    run_stream_adapter,
    select_batch_rows,
)

__all__ = ["ReversibleStack", "Streams", "couple_blocks", "draw_dropout_seed", "run_with_autograd"]

_Of = TypeVar("_Of")
Streams = tuple[Tensor, Tensor]


@dataclass(eq=False)
class ReversibleStack:
    """The blocks of a model and how they are coupled; the blocks stay children of the model alone."""

    blocks: list[nn.Module]
    plan: CouplingPlan
    calls: list[BlockArguments] = field(default_factory=list)
    """Of the forward pass that is under way."""
    warned: bool = False

    @property
    def factors(self) -> tuple[float, float]:
        """lambda and beta."""
        first, second = self.plan.coupling.scales_streams
        return (self.plan.factor if first else 1.0), (self.plan.factor if second else 1.0)

    def f_stages(self, index: int) -> Stages:
        """F of a block."""
        return self.plan.coupling.f_stages

    def g_stages(self, index: int) -> Stages:
        """G of a block; empty where it would feed the stream that nobody reads."""
        second = self.plan.coupling.g_stages
        unread = second == STREAM_ADAPTER and self.plan.merge == "main" and index == len(self.blocks) - 1
        return () if unread else second

    def list_adapters(self, index: int) -> list[Stage]:
        """A block's adapters: beside its feed-forward part; in the other stream, or in line behind attention."""
        coupled = self.f_stages(index), self.g_stages(index)
        if FULL_LAYER not in coupled:
            return ["attention", "feed"]
        return ["feed", "stream"] if STREAM_ADAPTER in coupled else ["feed"]

    def chunk_input(self, stage: Stage, x: Tensor) -> tuple[Tensor, ...]:
        """The pieces of an input that a stage takes one after the other."""
        return x.chunk(self.plan.pieces, dim=_ALONG[stage]) if stage in _ALONG else (x,)

    def chunk_arguments(self, stage: Stage, inputs: Sequence[Tensor], call: BlockArguments) -> list[BlockArguments]:
        """What is passed beside each piece."""
        if stage != "attention" or len(inputs) == 1:
            return [call] * len(inputs)
        sizes = [len(x) for x in inputs]
        starts = accumulate(sizes[:-1], initial=0)
        return [select_batch_rows(call, sum(sizes), start, size) for start, size in zip(starts, sizes, strict=True)]

    def join_chunks(self, stage: Stage, outs: Sequence[Tensor]) -> Tensor:
        """Pieces put together."""
        return outs[0] if len(outs) == 1 else torch.cat(list(outs), dim=_ALONG[stage])

    def run_stage(self, stage: Stage, index: int, x: Tensor, call: BlockArguments, seed: int | None) -> Tensor:
        """Part of a block."""
        inputs = self.chunk_input(stage, x)
        calls = enumerate(self.chunk_arguments(stage, inputs, call))
        return self.join_chunks(stage, [self.run_chunk(stage, index, at, inputs[at], one, seed) for at, one in calls])

    def run_chunk(self, stage: Stage, index: int, at: int, x: Tensor, call: BlockArguments, seed: int | None) -> Tensor:
        """Part of a block on piece ``at`` of its input; ``seed`` makes its dropout the same whenever it runs."""
        if seed is not None:
            place = (index * self.plan.pieces + at) * len(STAGES) + STAGES.index(stage)
            _seed_generators(seed + place, x.device)
        block, parts = self.blocks[index], self.plan.parts[index]
        if stage == "attention":
            return run_attention_half(block, parts, x, call)
        return run_feed_forward_half(block, parts, x) if stage == "feed" else run_stream_adapter(block, parts, x)

    def run_half(self, half: Stages, index: int, x: Tensor, call: BlockArguments, seed: int | None) -> Tensor:
        """F or G of a block, on the grid."""
        for stage in half:
            x = self.run_stage(stage, index, x, call, seed)
        return self.round_to_grid(x)

    def round_to_grid(self, x: Tensor) -> Tensor:
        """In double precision on the grid, gradients passing straight through; as it is in floating-point mode."""
        if self.plan.grid is None:
            return x
        rounded: Tensor = _Round.apply(x, 2.0**self.plan.grid)
        return rounded.double()

    def make_streams(self, hidden: Tensor) -> Streams:
        """Both streams begin as the stack's input."""
        x = self.round_to_grid(hidden)
        return x, x.view_as(x)

    def forward_block(
        self, index: int, x: Streams, call: BlockArguments, seed: int | None, dtype: torch.dtype
    ) -> tuple[Streams, bool]:
        """A block forwards; the streams behind it, and whether they lead back to the very bits of ``x``."""
        f = self.run_half(self.f_stages(index), index, x[1].to(dtype, copy=True), call, seed)
        y1, g, y2 = self.compute_y1(x, f), None, x[1]
        if self.g_stages(index):
            g = self.run_half(self.g_stages(index), index, y1.to(dtype, copy=True), call, seed)
            y2 = torch.add(g, x[1], alpha=self.factors[1])
        return self.swap_streams((y1, y2)), self.plan.grid is None or self._returns(x, (y1, y2), f, g)

    def compute_y1(self, x: Streams, f: Tensor) -> Tensor:
        """y1 from the streams below a block and F."""
        x1 = x[0] - self.round_to_grid(x[1]) if self.plan.coupling.is_damped else x[0]
        return torch.add(f, x1, alpha=self.factors[0])

    def recover_x1(self, y1: Tensor, x2: Tensor, f: Tensor) -> Tensor:
        """x1 from y1, x2 and F."""
        x1 = (y1 - f).div_(self.factors[0])
        return x1.add_(self.round_to_grid(x2)) if self.plan.coupling.is_damped else x1

    def recover_x2(self, y2: Tensor, g: Tensor | None) -> Tensor:
        """x2 from y2 and G."""
        return y2 if g is None else (y2 - g).div_(self.factors[1])

    def compute_input_gradients(self, dy1: Tensor | None, dy2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x1 and x2, but for what comes through F."""
        lam, beta = self.factors
        dx1 = dy1 if dy1 is None else dy1 * lam
        dx2 = dy2 if dy2 is None or beta == 1 else dy2 * beta
        if self.plan.coupling.is_damped and dx1 is not None:
            dx2 = -dx1 if dx2 is None else dx2 - dx1
        return dx1, dx2

    @torch.no_grad()
    def _returns(self, x: Streams, y: Streams, f: Tensor, g: Tensor | None) -> bool:
        """The guard, bitwise."""
        x2 = self.recover_x2(y[1], g)
        return torch.equal(x2, x[1]) and torch.equal(self.recover_x1(y[0], x2, f), x[0])

    def swap_streams(self, y: tuple[_Of, _Of]) -> tuple[_Of, _Of]:
        """Swap the streams, or swap them back, where the variant does so."""
        return (y[1], y[0]) if self.plan.coupling.swaps_streams else y

    def forward_blocks(
        self,
        x: Streams,
        calls: Sequence[BlockArguments],
        seed: int | None,
        dtype: torch.dtype,
        keep: dict[int, Streams] | None = None,
    ) -> Streams:
        """Run all blocks forwards, with F and G in ``dtype``; returns the last streams.

        If a block cannot be reversed, its outputs are rounded to the grid and its inputs are stored in ``keep``.
        """
        for index, call in enumerate(calls):
            y, whole = self.forward_block(index, x, call, seed, dtype)
            if self.plan.grid is not None and (index in self.plan.cuts or not whole):
                if keep is not None:
                    keep[index] = x
                y = self.round_to_grid(y[0]), self.round_to_grid(y[1])
            x = y
        return x

    def compute_output(self, x: Streams, dtype: torch.dtype) -> Tensor:
        """The stack's output."""
        merged = x[self.plan.coupling.output_stream] if self.plan.merge == "main" else (x[0] + x[1]) / 2
        return merged.to(dtype)

    def compute_stream_gradients(self, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the last streams from that of the output."""
        d = d_out if self.plan.grid is None else d_out.double()
        if self.plan.merge == "mean":
            return d / 2, d / 2
        return (None, d) if self.plan.coupling.output_stream else (d, None)


_ALONG: dict[Stage, int] = {"attention": 0, "feed": 1}
"""Attention sees no other rows, the feed-forward part no other tokens."""


def run_with_autograd(stack: ReversibleStack, hidden: Tensor, calls: Sequence[BlockArguments]) -> Tensor:
    """The stack by ordinary operations: for scoring, and with every activation stored, for checking gradients."""
    seed = draw_dropout_seed(stack)
    cards = [hidden.device] if hidden.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards, enabled=seed is not None):
        return stack.compute_output(
            stack.forward_blocks(stack.make_streams(hidden), calls, seed, hidden.dtype), hidden.dtype
        )


def draw_dropout_seed(stack: ReversibleStack) -> int | None:
    """The seed of a pass's dropout, drawn from the global generator; None while scoring."""
    return int(torch.randint(2**31, ())) if stack.blocks[0].training else None


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of the device, which draws dropout."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, scale: float) -> Tensor:
        return torch.mul(x, scale).round_().mul_(1 / scale)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


StackRunner = Callable[[ReversibleStack, Tensor, Sequence[BlockArguments]], Tensor]


def couple_blocks(model: nn.Module, plan: CouplingPlan, run: StackRunner) -> ReversibleStack:
    """Give the blocks their adapters, uninitialised, and let them run as one stack through ``run``."""
    blocks = list(model.get_submodule(plan.stack).children())
    stack = ReversibleStack(blocks, plan)
    for index, (block, parts) in enumerate(zip(blocks, plan.parts, strict=True)):
        norm = block.get_parameter(f"{parts.norms[0]}.weight")
        made = partial(BottleneckAdapter, len(norm), plan.rank, plan.dropout, norm.dtype)
        kinds = stack.list_adapters(index)
        block.add_module("adapters", nn.ModuleDict({kind: made() for kind in kinds}))
        block.__dict__["forward"] = partial(_run_block, stack, index, run)
    return stack


def _run_block(stack: ReversibleStack, index: int, run: StackRunner, *args: Any, **kwargs: Any) -> Tensor:
    """Store a block's arguments; the last block runs all of them.

    Each block thus keeps its name, and gets the arguments that the model passes to this block alone, such as a mask.
    """
    hidden, call = bind_block_arguments(stack.blocks[index], args, kwargs)
    stack.calls = [*stack.calls[:index], call]
    if index < len(stack.blocks) - 1:
        return hidden
    calls, stack.calls = stack.calls, []
    return run(stack, hidden, calls)
