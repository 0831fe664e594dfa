"""Chunked MLPs: run each MLP on a few tokens at a time and run it again in the backward pass.

What: an MLP treats every token by itself, so its tokens can be run in chunks. Only the input of a chunk is stored. The
wide activations inside the MLP exist for one chunk at a time, in the forward and in the backward pass.
Saves: the activations of all MLPs, which are the largest part of a block with a long text. Chunks alone would save
nothing, since each would keep its activations.
Exactness: loss and gradients equal those of the ordinary step up to the rounding of sums. Dropout inside an MLP is
drawn chunk by chunk.
Costs: a second forward pass of the MLPs.
Sends: what the other technique sends.
Use when: texts are long and attention is cheap, or beside ``gradient-checkpointing``, where the MLP of the recomputed
block sets the peak.
Avoid when: a step has few tokens.
Fits: models whose blocks hold their MLP as a module of its own, e.g. Llama, Qwen2 and GPT-2.
Source: Luo et al., "Mini-Sequence Transformer" (arXiv 2407.15892), the part on MLPs. Deviations: it recomputes; no
token is dropped if the chunk size does not divide the number of tokens.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.models.recomputation import recompute_in_backward
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique
from fedtune.techniques.deft._mlps import find_mlps

__all__ = ["ChunkedMlp"]


class ChunkedMlp(Technique):
    """Run MLPs on chunks of tokens and recompute them in the backward pass."""

    name: ClassVar[str] = "chunked-mlp"
    fits_zeroth_order: ClassVar[bool] = True
    fits_plain_blocks: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "deft": "densities are measured over all tokens of a step at once",
    }

    chunk_size: int = Field(256, ge=1, description="tokens that an MLP runs on together")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Replace the forward pass of each MLP; ModelError for a model whose MLPs are no modules of their own."""
        for mlp in _find_mlp_modules(model):
            vars(mlp)["forward"] = partial(_run_in_chunks, mlp, self.chunk_size)

    def make_reference(self) -> None:
        """Return the technique without chunks, which has the same gradients."""

    def _fold(self, model: nn.Module) -> None:
        """Restore the forward pass."""
        for mlp in _find_mlp_modules(model):
            vars(mlp).pop("forward", None)


def _find_mlp_modules(model: nn.Module) -> list[nn.Module]:
    try:
        found = find_mlps(model)
    except ModelError:
        found = []
    inside = [mlp for mlp in found if mlp.parent.removeprefix(f"{mlp.block_list}.").count(".")]
    if not inside or len(inside) < len(found):
        raise ModelError(f"the blocks of {type(model).__name__} hold no MLP as a module of its own; remove chunked-mlp")
    return [model.get_submodule(mlp.parent) for mlp in inside]


def _run_in_chunks(mlp: nn.Module, size: int, hidden: Tensor) -> Tensor:
    """The MLP of hidden states [..., h].

    In training the chunks are the same without gradients: meft runs a block both ways, and on some processors the bits
    of a product depend on the number of its rows.
    """
    run = partial(type(mlp).forward, mlp)
    if not mlp.training:
        plain: Tensor = run(hidden)
        return plain
    run_chunk = partial(recompute_in_backward, run) if torch.is_grad_enabled() else run
    made: list[Any] = [run_chunk(chunk) for chunk in hidden.flatten(0, -2).split(size)]
    return torch.cat(made).view_as(hidden)
