"""MEFT: train small adapters in reversible blocks, which store no activations for the backward pass.

What: MEFT turns the transformer blocks into a reversible network with two streams. The backward pass recomputes the
inputs of a block from its outputs. Each block gets two bottleneck adapters. The adapters and a classifier's new head
are trained; the pretrained weights stay frozen. ``variant`` selects how the streams are coupled. ``meft1``, ``meft2``
and ``meft3`` are the published couplings. ``diff`` is our extension and the default for every model: it is meft1 with
y1 = factor (x1 - x2) + layer(x2). It starts close to the pretrained model, whereas meft1 adds a fraction of the whole
residual in every block. The factor is set by ``scaling_factor``.
Saves: the activations of all blocks. A segment of blocks stores only its two output streams, in double precision. The
backward pass holds the autograd graph of half a block. With ``num_chunks`` it holds a fraction of that graph, because
attention processes the batch in chunks of rows, and the feed-forward layer in chunks of tokens.
Costs: one more forward pass, as with gradient checkpointing, and one more attention pass. MEFT also changes the
function of the pretrained model, because the factor stays in the network. The exported model therefore includes its own
code and cannot be merged back into the base.
Sends: 2 (2 rank width + rank + width) numbers per block, and the head.
Exactness: by default, gradients are bit-equal to those of the same network with stored activations. Four rules ensure
this. Streams are double precision. The outputs that blocks add to them are rounded to a grid. The factor is a power of
two. A segment ends before the 53 bits of a double are used up. If the values of a stream exceed the range measured at
the start, a bitwise check detects it, and the segment ends earlier. ``arithmetic: float`` uses the published
floating-point arithmetic. In deep models it cannot reconstruct activations exactly, and gradients become wrong; fedtune
then warns and prints the relative error.
Use when: activations fill the device's memory and the model is deep.
Avoid when: gradient checkpointing already fits, or the head needs more memory than the blocks (``fused-cross-entropy``
helps).
Source: Liao, Tan and Monz, "Make Pre-trained Model Reversible" (arXiv 2306.00477). The couplings MEFT1 to MEFT3, the
adapters, their initialisation, the factors and dropout follow the published code. Deviations: ``diff`` is new. Exact
arithmetic uses a factor of 1/8 instead of 0.1. The default is ``output_stream: main``; the published encoders use the
mean. The last block has no adapter for the stream that is not used after it. The rank is 8 for every model. Dropout
seeds are derived from the seed of the step.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters
from fedtune.techniques.meft._blocks import (
    UNRUN,
    BlockInputs,
    find_block_list,
    record_block_inputs,
    split_block,
    summarise_error,
    use_seeded_train_mode,
)
from fedtune.techniques.meft._couplings import COUPLINGS, CouplingPlan
from fedtune.techniques.meft._reversible import run_reversible
from fedtune.techniques.meft._two_streams import ReversibleStack, couple_blocks, run_with_autograd

__all__ = ["Meft"]

_DOUBLE = 53
"""Significant bits of a double-precision number."""


class Meft(Technique):
    """Couple the blocks reversibly; train adapters and a classifier's head."""

    name: ClassVar[str] = "meft"
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    unsupported_devices: ClassVar[Mapping[str, str]] = {"mps": "which has no double precision"}
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "gradient-checkpointing": "reversible blocks already store no activations",
        "selective-checkpointing": "reversible blocks store no activations that could be recomputed",
    }

    variant: Literal["diff", "meft1", "meft2", "meft3"] = "diff"
    scaling_factor: float = Field(
        0.125, gt=0, le=1, description="lambda, beta or both; a smaller value starts closer to the base"
    )
    rank: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1, description="inside the adapters")
    output_stream: Literal["main", "mean"] = Field(
        "main", description="main: the stream with the hidden states of the base"
    )
    arithmetic: Literal["exact", "float"] = "exact"
    value_bits: int = Field(28, ge=12, le=48, description="bits of a value; couplings use the rest of 53")
    num_chunks: int = Field(1, ge=1, description="chunks of the batch that run one after another; lowers the peak")
    store_activations: bool = Field(False, description="ordinary autograd, for comparison")

    _cut_count: int | None = PrivateAttr(None)
    """The number of cuts of a deeper model, while a plan traces a few of its blocks."""

    @model_validator(mode="after")
    def _exact_factors_are_powers_of_two(self) -> Self:
        if self.arithmetic == "exact" and math.frexp(self.scaling_factor)[0] != 0.5:
            raise ValueError(
                f"scaling_factor {self.scaling_factor} is not a power of two; set it to 0.125, or set arithmetic: float"
            )
        return self

    def find_conflict(self, other: Technique) -> str | None:
        """``deft`` reads all activations of a layer at once, and ``num_chunks`` splits them."""
        if other.name == "deft" and self.num_chunks > 1:
            return "deft measures all activations of a layer at once; set num_chunks: 1"
        return super().find_conflict(other)

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Give the blocks adapters drawn from ``seed`` and couple them; train the adapters and a classifier's head."""
        stack = find_block_list(model)
        hidden, calls = run = record_block_inputs(model, stack)
        blocks = model.get_submodule(stack).named_children()
        parts = tuple(split_block(f"{stack}.{i}", b, hidden, call) for (i, b), call in zip(blocks, calls, strict=True))
        plan = CouplingPlan(
            stack,
            parts,
            self.variant,
            self.scaling_factor,
            self.rank,
            self.dropout,
            self.output_stream,
            self.num_chunks,
        )
        made = couple_blocks(model, plan, run_with_autograd if self.store_activations else run_reversible)
        _init_adapters(made, seed)
        if self.arithmetic == "exact":
            made.plan = replace(plan, grid=self.value_bits - _measured(model, made, run), cuts=self._cuts(len(parts)))
        vars(model)["meft"] = made
        unfreeze_parameters(model, [name for name, _ in model.named_parameters() if ".adapters." in name])
        if task.has_new_head:
            unfreeze_parameters(model, list_head_parameters(model))

    def has_unchanged_base(self) -> bool:
        """Return False: the factor stays in the network."""
        return False

    def _fold(self, model: nn.Module) -> None:
        """Make the model save itself with the code of its two streams."""
        from fedtune.techniques.meft._meft_in_transformers import export_with_code

        stack: ReversibleStack = vars(model).pop("meft")
        if not type(model).__module__.startswith("transformers."):
            raise ModelError(f"meft cannot export a {type(model).__name__}, which brings code of its own already")
        export_with_code(model, stack.plan)

    def make_reference(self) -> "Meft":
        """Return the same network with stored activations."""
        return self.model_copy(update={"store_activations": True})

    def for_depth(self, blocks: int, fewest: int) -> "Meft | None":
        """Return the technique with as many cuts as ``blocks`` need; None if there is no block beside each cut."""
        if self.arithmetic == "float":
            return self
        planned = self.model_copy()
        planned._cut_count = self._count_cuts(blocks)
        return planned if 2 * planned._cut_count < fewest else None

    def _count_cuts(self, blocks: int) -> int:
        """The fewest cuts so that no stretch of blocks between them outgrows a double."""
        longest = self._segment(blocks)
        return next(n for n in range(blocks + 1) if -(-(blocks - n) // (n + 1)) <= longest)

    def _cuts(self, blocks: int) -> tuple[int, ...]:
        """The blocks, evenly spaced, whose inputs are kept."""
        cuts = self._count_cuts(blocks) if self._cut_count is None else self._cut_count
        return tuple(round((cut + 1) * (blocks + 1) / (cuts + 1)) - 1 for cut in range(cuts))

    def _segment(self, blocks: int) -> int:
        """How many blocks the bits behind the grid suffice for: each scaling of a stream by the factor takes some."""
        each = -round(math.log2(self.scaling_factor))
        if not each:
            return blocks
        scalings = (_DOUBLE - self.value_bits) // each
        return 2 * scalings if COUPLINGS[self.variant].swaps_streams else scalings


def _init_adapters(stack: ReversibleStack, seed: int) -> None:
    """Matrices from N(0, 0.02 ** 2), biases 0, in the blocks' order."""
    random = torch.Generator().manual_seed(seed)
    for block in stack.blocks:
        for name, parameter in block.get_submodule("adapters").named_parameters():
            drawn = torch.zeros(parameter.shape)
            if name.endswith("weight"):
                drawn.normal_(0, 0.02, generator=random)
            parameter.data.copy_(drawn)


def _measured(model: nn.Module, stack: ReversibleStack, run: BlockInputs) -> int:
    """The range, where the coupled blocks run at all."""
    try:
        return _count_range_bits(model, stack, run)
    except UNRUN as error:
        name = type(model).__name__
        raise ModelError(f"{name} does not run as two streams ({summarise_error(error)}); leave meft out") from error


def _count_range_bits(model: nn.Module, stack: ReversibleStack, run: BlockInputs) -> int:
    """Bits before the point of twice the largest stream value seen on the probe's inputs."""
    hidden, calls = run
    largest = hidden.abs().max()
    x = hidden.double(), hidden.double()
    with use_seeded_train_mode(model):
        for index, call in enumerate(calls):
            x, _ = stack.forward_block(index, x, call, None, hidden.dtype)
            largest = torch.maximum(largest, torch.stack(x).abs().max())
    return math.ceil(math.log2(float(largest))) + 1
