"""Dynamic pruning: train sparse weights under a mask that changes and is the same on all clients; send nothing dense.

What: every convolution and linear layer has a fixed number of active weights; all others are zero. Every
``update_every`` rounds, up to round ``last_update_round``, the server changes the mask of each layer. It drops the k
smallest merged weights and activates the k inactive weights with the largest gradient, which start at zero. k =
drop_fraction / 2 (1 + cos(pi t / last_update_round)) times the number of active weights. After training, clients
compute the gradient of one batch, layer by layer, and send its k largest entries at inactive positions. ``extrusion``
(budget-aware extrusion) reduces the loss from a drop. In a round with a mask update, the k smallest active weights get
the loss strength * |theta_S|^2. Their learning rate is raised to beta = p (2 sigmoid(|theta_S|) - 1) lr_0 while this
exceeds the schedule's rate, with p = (2 T - 2 t) / (2 T - t) over the T steps of the round.
Saves: communication and, on a device with sparse kernels, the memory of weights, gradients and optimiser moments.
PyTorch stores them dense here. Add ``activation-pruning`` to save activation memory.
Sends: the active values in both directions, 4 bytes each. The masks go down, with at most one bit per weight. When the
mask changes, clients also send k positions of one byte (plus one byte per 255 weights) and k gradients of two bytes.
Use when: you train a model from scratch, or all of its weights, and the uplink or the device's storage is small. For a
net with batch norms trained from scratch, add ``batch-norm-statistics``, or ``activation-pruning`` with
``standardise_weights``.
Avoid when: an adapter is enough; it sends less. Embeddings, norms and biases stay dense and count towards ``density``.
Source: Huang et al., "FedMef" (CVPR 2024), equations 2 to 5 for extrusion, as read from the abstract, the reviews, the
released code and a port; the body of the paper was not available. The released code marks masked zeros, never uses
lambda and does not mask gradients; this implementation follows the paper. Layer densities: Evci et al. (arXiv
1911.11134). Deviations: the mask is sent in every round, so clients store nothing. Clients send only the k largest
gradients, as the paper says and the code does not, in bfloat16. Baselines: ``update_every: null`` is a fixed random
mask. ``extrusion: null`` is dynamic pruning alone. ``updated_by: clients`` is FedDST (arXiv 2112.09824): each client
changes its mask in the middle of a round, and the server averages each weight over the clients that hold it and keeps
the largest ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedtune.tasks import Task
from fedtune.techniques._technique import ExtraPayload, StepInfo, Technique, unfreeze_parameters
from fedtune.techniques.pruning._client_masks import (
    average_over_holders,
    declare_mask_update,
    pack_mask_update,
    update_client_mask,
)
from fedtune.techniques.pruning._extrusion import Extrusion, MaskableLayer, add_extrusion_gradient, compute_extrusion_lr
from fedtune.techniques.pruning._layer_density import count_active_weights
from fedtune.techniques.pruning._mask_updates import average_gradients, mask_largest, mask_smallest_active, update_mask
from fedtune.techniques.pruning._packed_positions import declare_positions, pack_positions
from fedtune.techniques.pruning._standardised_conv2d import is_standardised
from fedtune.wire.client_update import TensorSpec
from fedtune.wire.masked_weights import find_masks, mask_name

__all__ = ["DynamicPruning"]


class DynamicPruning(Technique):
    """Train all weights under a mask that changes."""

    name: ClassVar[str] = "dynamic-pruning"
    fits_plain_blocks: ClassVar[bool] = True
    has_exact_gradients: ClassVar[bool] = False
    renewed_tensors: ClassVar[str | None] = "which moves the active weights to other places"
    unsupported_devices: ClassVar[Mapping[str, str]] = {"mps": "which has no double precision"}
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "bias": "all weights are trained under masks",
        "head-only": "all weights are trained under masks",
        "full": "all weights are trained under masks",
        "lora": "a mask needs trained weights, and lora freezes them",
        "meft": "a mask needs trained weights, and meft freezes them",
        "qlora": "a mask needs trained weights, and qlora freezes them",
    }

    density: float = Field(0.1, gt=0, le=1, description="active fraction of the whole model, including dense tensors")
    update_every: int | None = Field(10, ge=1, description="rounds between mask updates; null: no updates")
    last_update_round: int = Field(300, ge=1, description="last round with a mask update")
    drop_fraction: float = Field(
        0.2, gt=0, le=1, description="alpha: fraction of a layer's active weights that the first update drops"
    )
    initial_mask: Literal["random", "magnitude"] = Field(
        "random", description="magnitude: the largest pretrained weights"
    )
    updated_by: Literal["server", "clients"] = "server"
    extrusion: Extrusion | None = Extrusion()

    @model_validator(mode="after")
    def _extrusion_is_for_the_servers_drop(self) -> Self:
        if self.updated_by == "clients" and self.extrusion is not None:
            raise ValueError(
                "extrusion prepares weights that the server will prune; set extrusion: null when updated_by is clients"
            )
        return self

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Draw the masks from ``seed``, set inactive weights to zero, and train everything."""
        layers = dict(_layers(model))
        weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
        dense = sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in weights.values())
        counts = count_active_weights({name: tuple(w.shape) for name, w in weights.items()}, dense, self.density)
        random = torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            drawn = torch.rand(layer.weight.shape, generator=random)
            scores = drawn if self.initial_mask == "random" else layer.weight.detach().abs()
            mask = mask_largest(scores, counts[f"{name}.weight"]).to(layer.weight.device)
            layer.register_buffer("mask", mask)
            layer.weight.data *= mask
        unfreeze_parameters(model, [name for name, _ in model.named_parameters()])

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """The masks."""
        return [f"{name}.mask" for name, _, _ in _list_masked_layers(model)]

    def before_optimiser_step(self, model: nn.Module, step_info: StepInfo) -> float:
        """Mask the gradients. Shrink the weights that will be dropped, or drop them here."""
        if (
            self.updated_by == "clients"
            and self._is_update_round(step_info.round)
            and step_info.step == step_info.local_steps // 2
        ):
            self._update_client_masks(model, step_info.round)
        for _, layer, mask in _list_masked_layers(model):
            if layer.weight.grad is not None:
                layer.weight.grad *= mask
        if self.extrusion is None or not self._is_update_round(step_info.round):
            return step_info.lr
        if step_info.step == 0:
            self._mark_smallest_weights(model, step_info.round)
        square = sum(
            add_extrusion_gradient(layer, self.extrusion.strength) for _, layer, _ in _list_masked_layers(model)
        )
        return max(step_info.lr, compute_extrusion_lr(step_info, math.sqrt(square)))

    def declare_extra_payload(self, model: nn.Module, round_number: int) -> dict[str, TensorSpec]:
        """Return positions and gradients of the weights to activate, in a round before a mask update."""
        asked: dict[str, TensorSpec] = {}
        for name, _, mask in _list_masked_layers(model) if self._is_update_round(round_number) else ():
            count = self._count_swaps(mask, round_number)
            if self.updated_by == "clients":
                asked |= declare_mask_update(name, mask.numel(), count)
            else:
                asked |= declare_positions(f"{name}.wake", count, mask.numel())
                asked |= {f"{name}.wake_gradient": TensorSpec((count,), "BF16")}
        return asked

    def compute_extra_payload(
        self, model: nn.Module, round_number: int, run_backward: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Return the largest gradients at inactive positions; ``run_backward`` may sum them over micro-batches."""
        if not self._is_update_round(round_number):
            return {}
        if self.updated_by == "clients":
            return _pack_mask_updates(model)
        found: dict[str, Tensor] = {}
        model.zero_grad()
        try:
            run_backward()
            for name, layer, mask in _list_masked_layers(model):
                found |= _largest_inactive(name, layer.weight, mask, self._count_swaps(mask, round_number))
        finally:
            model.zero_grad()
        return found

    def after_aggregation(
        self, state: Mapping[str, Tensor], round_number: int, extra_payloads: Sequence[ExtraPayload]
    ) -> dict[str, Tensor]:
        """Update each mask: drop k smallest weights, activate k with the largest gradients at zero; or FedDST."""
        revised = dict(state)
        for name, mask in find_masks(state).items() if self._is_update_round(round_number) else ():
            owner = name.removesuffix(".weight")
            if self.updated_by == "clients":
                revised[name], revised[mask_name(name)] = average_over_holders(owner, state[name], mask, extra_payloads)
            else:
                after = update_mask(
                    state[name],
                    mask,
                    average_gradients(mask, extra_payloads, owner),
                    self._count_swaps(mask, round_number),
                )
                revised[name], revised[mask_name(name)] = state[name] * (mask & after), after
        return revised

    def has_weight_masks(self) -> bool:
        """Return True, even for fixed masks."""
        return True

    def has_unchanged_base(self) -> bool:
        """Return False: weights are set to zero."""
        return False

    def _fold(self, model: nn.Module) -> None:
        """Remove the masks; inactive weights stay zero. Normalised weights need theirs to be merged."""
        for _, layer, _ in list(_list_masked_layers(model)):
            if not is_standardised(layer):
                del layer.mask

    def _is_update_round(self, round_number: int) -> bool:
        return (
            self.update_every is not None
            and round_number % self.update_every == 0
            and round_number <= self.last_update_round
        )

    def _count_swaps(self, mask: Tensor, round_number: int) -> int:
        """Return how many entries of a layer a mask update swaps: at most the number of inactive ones."""
        active = int(mask.sum())
        wanted = math.floor(
            self.drop_fraction / 2 * (1 + math.cos(math.pi * round_number / self.last_update_round)) * active
        )
        return min(wanted, mask.numel() - active)

    def _update_client_masks(self, model: nn.Module, round_number: int) -> None:
        """Update the mask on the client, from the gradients of the step."""
        for _, layer, mask in _list_masked_layers(model):
            gradient = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
            vars(layer)["received"] = update_client_mask(
                layer.weight.data, gradient, mask, self._count_swaps(mask, round_number)
            )

    def _mark_smallest_weights(self, model: nn.Module, round_number: int) -> None:
        """Store the smallest active weights at the start of a round."""
        for _, layer, mask in _list_masked_layers(model):
            vars(layer)["marked"] = mask_smallest_active(
                layer.weight.detach(), mask, self._count_swaps(mask, round_number)
            ).bool()


def _layers(model: nn.Module) -> Iterator[tuple[str, MaskableLayer]]:
    """Return the convolutions and linear layers that do not share their weight."""
    owners = [id(p) for layer in model.modules() for p in layer.parameters(recurse=False)]
    for name, layer in model.named_modules():
        if isinstance(layer, MaskableLayer) and owners.count(id(layer.weight)) == 1:
            yield name, layer


def _list_masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskableLayer, Tensor]]:
    for name, layer in model.named_modules():
        mask = layer._buffers.get("mask")
        if isinstance(layer, MaskableLayer) and mask is not None:
            yield name, layer, mask


def _pack_mask_updates(model: nn.Module) -> dict[str, Tensor]:
    """Return what a client reports about its own mask updates."""
    found: dict[str, Tensor] = {}
    for name, layer, mask in _list_masked_layers(model):
        found |= pack_mask_update(name, layer.weight.detach(), vars(layer)["received"], mask)
    return found


def _largest_inactive(name: str, weight: Tensor, mask: Tensor, count: int) -> dict[str, Tensor]:
    """Return the largest inactive entries of a gradient and free the rest; zeros if there is no gradient."""
    gradient = (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten()
    weight.grad = None
    places = gradient.abs().masked_fill(mask.flatten() == 1, -1.0).topk(count).indices.sort().values
    kept = gradient[places].bfloat16()
    return {**pack_positions(f"{name}.wake", places, mask.numel()), f"{name}.wake_gradient": kept}
