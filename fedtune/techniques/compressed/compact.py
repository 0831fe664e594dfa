"""CompAct: linear layers keep a random projection of their input, and train in that space.

What: a linear layer y = x W keeps z = x P instead of x, where P has n x r entries from N(0, 1 / r), r = n / reduction.
The gradient of W is known as its projection G P. The optimiser works on it, and W moves by its step times Pᵀ. Here W is
frozen during a round and U, the sum of the steps, is trained: y = x W + (x P) U. That is the same algorithm, because P
is the same for all steps of a round. After the round the server adds the mean of U Pᵀ to W, and the next round draws
another P. Gradients of inputs, biases and norms are exact.
Saves: of the kept inputs of linear layers, all but 1 / reduction; of gradients and optimiser state, the same. The
weights stay, and norms, activation functions and attention keep what they keep.
Costs: a narrow product beside each matrix product.
Sends: up, r (out) numbers for each matrix, ``reduction`` times fewer than its weight. Clients share P, which is drawn
from the seed and the round and is not sent. Down, all trained weights.
Error: for one draw, the gradient G P Pᵀ has a cosine of 1 / sqrt(1 + n / r) with G: .45 for a reduction of 4. It is
unbiased; only the mean over many draws is close to G. A round explores r directions of each input.
Use when: all weights should move, and the inputs of linear layers fill the memory.
Avoid when: rounds are few, since each explores one subspace. ``lora`` learns its subspace, and keeps less. A server
optimiser with momentum would carry it from one subspace into another.
Source: Shamshoum et al., "CompAct: Compressed Activations for Memory-Efficient LLM Training" (arXiv 2410.15352),
section 3, algorithm 1. Deviations: P changes every round instead of every T steps, with fresh optimiser state. Layers
of the same width share P, so that query, key and value keep one z. The scale of GaLore is one. The wire form is ours.
Weight decay acts on the update of the round alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.models.read_past import read_past
from fedtune.tasks import Task
from fedtune.techniques._technique import ExtraPayload, Technique, list_head_parameters, unfreeze_parameters
from fedtune.techniques.compressed._projected_linear import (
    UPDATE,
    ProjectedInputs,
    draw_projection,
    install_projection,
    merge_projection,
    set_projection,
)

__all__ = ["Compact"]

_TRAINS_ALL = "compact trains all weights itself"
_FREEZES = "compact trains the weights that it freezes"


class Compact(Technique):
    """Train linear layers in a random subspace that changes every round."""

    name: ClassVar[str] = "compact"
    has_exact_gradients: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    renewed_tensors: ClassVar[str | None] = "which trains another random subspace in every round"
    conflicts_with: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("full", "bias", "head-only", "batch-norm", "last-blocks"), _TRAINS_ALL),
        **dict.fromkeys(("lora", "qlora", "o-lora", "inf-lora", "meft", "mobiletl", "tinytl"), _FREEZES),
        "dynamic-pruning": "a mask needs trained weights, and compact trains their updates",
        "activation-pruning": "both decide what linear layers store of their inputs",
    }

    reduction: int = Field(4, ge=1, description="width of an input over the width of its projection")
    trained: Literal["all", "matrices"] = Field(
        "all", description="matrices: of a pretrained model, only linear layers inside blocks, and a new head"
    )
    projection_seed: int = Field(0, description="with the round, what the projections are drawn from")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Add the updates and freeze the matrices."""
        head = list_head_parameters(model) if task.has_new_head else []
        layers = list(_list_matrices(model, {name.rpartition(".")[0] for name in head} | set(read_past(model))))
        if not layers:
            raise ModelError(f"{type(model).__name__} has no plain linear layer of its own; leave the technique out")
        others = [name for name, _ in model.named_parameters()] if self.trained == "all" else head
        inputs = vars(model)["compact"] = ProjectedInputs()
        for _, layer in layers:
            install_projection(layer, self._count_rank(layer.in_features), inputs)
        matrices = {f"{name}.weight" for name, _ in layers}
        updates = [f"{name}.{UPDATE}" for name, _ in layers]
        unfreeze_parameters(model, [*updates, *(name for name in others if name not in matrices)])
        self.begin_round(model, 1)

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Draw the projections of the round."""
        drawn: dict[int, Tensor] = {}
        for _, layer in _list_projected(model):
            width, like = layer.in_features, layer.weight
            if width not in drawn:
                drawn[width] = self._draw(round_number, width).to(like.device, like.dtype)
            set_projection(layer, drawn[width])

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Forget the projections of the last step."""
        vars(model)["compact"].clear()

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """The matrices, which the server moves."""
        return [f"{name}.weight" for name, _ in _list_projected(model)]

    def changes_per_round(self) -> bool:
        """Return True: an update belongs to the projections of its round."""
        return True

    def has_unchanged_base(self) -> bool:
        """Return False: all weights move."""
        return False

    def after_aggregation(
        self, state: Mapping[str, Tensor], round_number: int, extra_payloads: Sequence[ExtraPayload]
    ) -> dict[str, Tensor]:
        """Move each matrix by its mean update, and begin the next one at zero."""
        revised = dict(state)
        for name, update in state.items():
            owner, _, last = name.rpartition(".")
            if last == UPDATE:
                weight = state[f"{owner}.weight"]
                projection = self._draw(round_number, weight.shape[1]).to(update.device)
                revised[f"{owner}.weight"] = (weight.float() + update.float() @ projection.T).to(weight.dtype)
                revised[name] = torch.zeros_like(update)
        return revised

    def _count_rank(self, width: int) -> int:
        return max(1, width // self.reduction)

    def _draw(self, round_number: int, width: int) -> Tensor:
        return draw_projection(self.projection_seed, round_number, width, self._count_rank(width))

    def _fold(self, model: nn.Module) -> None:
        """W + U Pᵀ as plain layers."""
        for _, layer in list(_list_projected(model)):
            merge_projection(layer)
        del vars(model)["compact"]


def _list_matrices(model: nn.Module, left_out: set[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Return the plain linear layers that run alone and share their weight with no other layer, but not the head."""
    owners = [id(one) for layer in model.modules() for one in layer.parameters(recurse=False)]
    for name, layer in model.named_modules():
        is_plain = type(layer) is nn.Linear and "forward" not in vars(layer) and name not in left_out
        if is_plain and owners.count(id(layer.weight)) == 1 and layer is not _find_output(model):
            yield name, layer


def _find_output(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = get() if get is not None else None
    return found


def _list_projected(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and UPDATE in layer._parameters:
            yield name, layer
