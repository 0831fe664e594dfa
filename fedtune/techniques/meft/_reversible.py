"""Run a two-stream stack without storing its activations: the backward pass recomputes them from the outputs.

The backward pass reverses one block after the other and reruns each half to get its gradient, so that the graph of one
half exists at a time. Bit-equal gradients need bit-equal halves: the seed of dropout, the precision and the arguments
of each block are those of the forward pass.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from fedtune.accelerator import fork_random_state
from fedtune.errors import ModelError
from fedtune.techniques._implicit_gradients import compute_input_gradients
from fedtune.techniques._loss_terms import add_loss_term, collect_loss_terms
from fedtune.techniques.meft._couplings import Stage, Stages
from fedtune.techniques.meft._halves import BlockArguments, drop_cache_arguments
from fedtune.techniques.meft._two_streams import ReversibleStack, Streams, draw_dropout_seed, run_with_autograd

__all__ = ["run_reversible"]


def run_reversible(stack: ReversibleStack, hidden: Tensor, calls: Sequence[BlockArguments]) -> Tensor:
    """The stack's output, with gradients for its input and for all trained parameters."""
    if not torch.is_grad_enabled():
        return run_with_autograd(stack, hidden, calls)
    parameters = [one for block in stack.blocks for one in block.parameters() if one.requires_grad]
    calls = [drop_cache_arguments(call) for call in calls]
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(calls)):
        raise ModelError("meft cannot give gradients to what is passed to its blocks beside the hidden states; drop it")
    autocast = _get_autocast(hidden.device.type)
    forward_pass = _ReversiblePass(stack, calls, draw_dropout_seed(stack), hidden.dtype, autocast, parameters)
    out: Tensor
    out, term = _Reversible.apply(forward_pass, hidden, *parameters)
    if forward_pass.emitted:
        add_loss_term(term)
    return out


@dataclass(eq=False)
class _ReversiblePass:
    """Values that the forward and the backward pass share."""

    stack: ReversibleStack
    calls: Sequence[BlockArguments]
    seed: int | None
    dtype: torch.dtype
    autocast: tuple[str, torch.dtype, bool]
    parameters: list[Parameter]
    emitted: bool = False

    def use_forward_autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the forward pass. Casts are not cached, because some are made without a graph."""
        return torch.autocast(*self.autocast, cache_enabled=False)


def _get_autocast(kind: str) -> tuple[str, torch.dtype, bool]:
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward_pass: _ReversiblePass, hidden: Tensor, *_: Parameter) -> tuple[Tensor, Tensor]:
        stack, kept = forward_pass.stack, dict[int, Streams]()
        start = stack.make_streams(hidden)
        state = fork_random_state(hidden.device)
        with state, forward_pass.use_forward_autocast(), collect_loss_terms() as terms:
            ends = stack.forward_blocks(start, forward_pass.calls, forward_pass.seed, forward_pass.dtype, kept)
        forward_pass.emitted = bool(terms)
        ctx.forward_pass, ctx.kept = forward_pass, list(kept)
        ctx.checksums = None if stack.plan.grid is None else _compute_checksums(start)
        original = () if stack.plan.grid is not None else (hidden,)
        ctx.save_for_backward(*ends, *(stream for pair in kept.values() for stream in pair), *original)
        return stack.compute_output(ends, forward_pass.dtype), torch.stack(terms).sum() if terms else hidden.new_zeros(
            ()
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_term: Tensor) -> tuple[Tensor | None, ...]:
        forward_pass: _ReversiblePass = ctx.forward_pass
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # from here on a pair of streams goes as soon as it was used
        original = saved.pop() if ctx.checksums is None else None
        backward_pass = _BackwardPass(
            forward_pass, (saved.pop(0), saved.pop(0)), forward_pass.stack.compute_stream_gradients(d_out), d_term
        )
        with fork_random_state(d_out.device):
            for index in reversed(range(len(forward_pass.calls))):
                kept = (saved.pop(-2), saved.pop(-1)) if index in ctx.kept else None
                backward_pass.reverse_block(index, kept, index > 0 or ctx.needs_input_grad[1])
        _check_reconstruction(forward_pass.stack, backward_pass.y, ctx.checksums, original)
        d_hidden = _sum(*backward_pass.d) if ctx.needs_input_grad[1] else None
        found = [backward_pass.gradients.get(id(one)) for one in forward_pass.parameters]
        return None, None if d_hidden is None else d_hidden.to(forward_pass.dtype), *found


class _Chunk(NamedTuple):
    """One of the pieces of its input that a stage of a block processes one after the other."""

    stage: Stage
    block: int
    position: int
    x: Tensor
    call: BlockArguments


@dataclass(eq=False)
class _BackwardPass:
    """The streams ``y`` after the next block to reverse, their gradients, and the gradients of parameters so far.

    Streams and gradients are replaced one by one, because each variable that lives too long adds to the peak memory.
    """

    forward_pass: _ReversiblePass
    y: Streams
    d: tuple[Tensor | None, Tensor | None]
    d_term: Tensor
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def reverse_block(self, index: int, kept: Streams | None, needs_input_grad: bool) -> None:
        """Reverse one block. ``kept`` are its inputs if stored; ``needs_input_grad`` asks for their gradients too."""
        stack, forward_pass = self.forward_pass.stack, self.forward_pass
        self.y, self.d = stack.swap_streams(self.y), stack.swap_streams(self.d)
        if kept is not None:
            with forward_pass.use_forward_autocast(), collect_loss_terms():
                f = stack.run_half(
                    stack.f_stages(index),
                    index,
                    kept[1].to(forward_pass.dtype, copy=True),
                    forward_pass.calls[index],
                    forward_pass.seed,
                )
            self.y = stack.compute_y1(kept, f), kept[1]
            del f
        if stack.g_stages(index):
            g, through = self.rerun_half(stack.g_stages(index), index, self.y[0], self.d[1], True)
            self.y = self.y[0], self.y[1] if kept is not None else stack.recover_x2(self.y[1], g)
            self.d = _sum(self.d[0], through), self.d[1]
            del g, through
        f, through = self.rerun_half(stack.f_stages(index), index, self.y[1], self.d[0], needs_input_grad)
        self.y = kept or (stack.recover_x1(*self.y, f), self.y[1])
        dx1, dx2 = stack.compute_input_gradients(*self.d)
        self.d = dx1, _sum(dx2, through)

    def rerun_half(
        self, half: Stages, index: int, x: Tensor, d: Tensor | None, inner: bool
    ) -> tuple[Tensor, Tensor | None]:
        """F or G of ``x`` again, and the gradient of ``x`` from that of the result; one graph of a stage at a time."""
        last = x.to(self.forward_pass.dtype, copy=True)
        for stage in half[:-1]:
            with (
                self.forward_pass.use_forward_autocast(),
                collect_loss_terms(),
            ):  # these terms come again, with their graph
                last = self.forward_pass.stack.run_stage(
                    stage, index, last, self.forward_pass.calls[index], self.forward_pass.seed
                )
        out, d = self.rerun_stage(half[-1], index, last, d, inner or len(half) > 1)
        del last
        for stage in half[:-1]:
            _, d = self.rerun_stage(stage, index, x.to(self.forward_pass.dtype, copy=True), d, inner)
        return self.forward_pass.stack.round_to_grid(out), None if d is None else d.to(x.dtype)

    def rerun_stage(
        self, stage: Stage, index: int, x: Tensor, d: Tensor | None, inner: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A stage's output and the gradient of its input, chunk by chunk; the last chunk first, as autograd would."""
        stack, call = self.forward_pass.stack, self.forward_pass.calls[index]
        inputs = stack.chunk_input(stage, x)
        calls = stack.chunk_arguments(stage, inputs, call)
        by = [None] * len(inputs) if d is None else stack.chunk_input(stage, d)
        last_first = [
            self.rerun_chunk(_Chunk(stage, index, at, inputs[at], calls[at]), by[at], inner)
            for at in reversed(range(len(inputs)))
        ]
        outs = [out for out, _ in reversed(last_first)]
        dx = [one for _, one in reversed(last_first) if one is not None]
        return stack.join_chunks(stage, outs), stack.join_chunks(stage, dx) if dx else None

    def rerun_chunk(self, chunk: _Chunk, d: Tensor | None, inner: bool) -> tuple[Tensor, Tensor | None]:
        """The same for one chunk; adds to the gradients of the block's parameters."""
        forward_pass, x = self.forward_pass, chunk.x.detach().requires_grad_(inner)
        with torch.enable_grad(), forward_pass.use_forward_autocast(), collect_loss_terms() as terms:
            out = forward_pass.stack.run_chunk(
                chunk.stage, chunk.block, chunk.position, x, chunk.call, forward_pass.seed
            )
        pairs = [(out, d), *((term, self.d_term) for term in terms)]
        outs = [(one, by.to(one.dtype)) for one, by in pairs if by is not None and one.requires_grad]
        if not outs:
            return out.detach(), None
        trained = [one for one in forward_pass.stack.blocks[chunk.block].parameters() if one.requires_grad]
        wanted = [*trained, *([x] if inner else [])]
        found = compute_input_gradients([one for one, _ in outs], wanted, [by for _, by in outs])
        self.add_gradients(trained, found)
        return out.detach(), found[-1] if inner else None

    def add_gradients(self, trained: Sequence[Parameter], found: Sequence[Tensor | None]) -> None:
        """Add to the parameters' gradients."""
        for parameter, gradient in zip(trained, found, strict=False):
            if gradient is not None:
                before = self.gradients.get(id(parameter))
                self.gradients[id(parameter)] = gradient if before is None else before + gradient


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _compute_checksums(x: Streams) -> tuple[int, ...]:
    """A checksum of each stream's bits. Adding zero turns -0.0 into 0.0."""
    return tuple(int((stream + 0.0).view(torch.int64).sum()) for stream in x)


def _check_reconstruction(
    stack: ReversibleStack, start: Streams, checksums: tuple[int, ...] | None, original: Tensor | None
) -> None:
    """Check that the streams before the first block are those that the stack began with."""
    if checksums is not None and checksums != _compute_checksums(start):
        raise ModelError(
            "meft's blocks gave other bits when they ran again, so their gradients would be wrong; "
            "leave the number of threads and the parameters alone between the forward and the backward pass"
        )
    if original is not None and not stack.warned and (error := _compute_error(start, original)) > 0:
        stack.warned = True
        warnings.warn(
            f"meft in float mode rebuilt the input of its first block with a relative error of {error:.1e}, and the "
            "gradients of the blocks are wrong accordingly; arithmetic: exact has no such error",
            stacklevel=2,
        )


def _compute_error(start: Streams, original: Tensor) -> float:
    """The larger of the streams' relative errors; infinite if it is not a number."""
    errors = [float((stream - original).norm() / original.norm()) for stream in start]
    return max(errors) if all(math.isfinite(error) for error in errors) else math.inf
