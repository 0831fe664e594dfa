"""ADA-DEFT-style weights: a trained factor for the output of each MLP; MLPs with a small factor are skipped.

Our own definition, for the paper's abstract names the idea only: w = sigmoid(SPEED theta), w_0 = sigmoid(4);
loss = task + alpha sum_l w_l D_l / sum_l w_l + gamma mean_l w_l. In evaluation, w is 0 below a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from fedtune.techniques._loss_terms import add_loss_term
from fedtune.techniques.deft._density_probe import DensityProbe
from fedtune.techniques.deft._mlps import MlpLayers
from fedtune.techniques.deft._skipping import remove_mlps_for_export
from fedtune.techniques.low_rank._low_rank import dequantise_linear

__all__ = ["MlpWeight", "MlpWeightLoss", "attach_mlp_weights", "merge_mlp_weights", "register_mlp_weights"]

_SPEED = 100.0
"""Adaptive optimisers move every parameter by about the learning rate a step; theta has to cover a distance of six."""

_THETA = "deft_theta"


@dataclass(eq=False)
class MlpWeight:
    """Forward hook of an MLP's narrowing layer."""

    theta: nn.Parameter
    skip_below: float

    def current_weight(self) -> Tensor:
        """w [1], as trained."""
        return torch.sigmoid(_SPEED * self.theta)

    @torch.no_grad()
    def inference_weight(self) -> float:
        """w, or 0 when the MLP is skipped."""
        weight = float(self.current_weight())
        return weight if weight >= self.skip_below else 0.0

    def __call__(self, second: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The MLP's weighted output."""
        return out * (self.current_weight().to(out.dtype) if second.training else self.inference_weight())


@dataclass(eq=False)
class MlpWeightLoss:
    """Forward hook of the whole model: adds the loss terms that train the weights.

    Layers add alpha w_l / (sum w) D_l with a constant factor, which gives the gradient of D_l and lets a block run
    alone. This hook adds the derivative by the weights, with D_l constant and value 0.
    """

    probes: list[DensityProbe]
    weights: list[MlpWeight]
    alpha: float
    gamma: float

    def begin_step(self) -> None:
        """Give every probe its share of the density term."""
        for probe, share in zip(self.probes, self._shares(), strict=True):
            probe.weight = self.alpha * float(share.detach())

    def __call__(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Add both loss terms after the layers have measured their densities."""
        if not model.training:
            return
        shares = torch.cat(self._shares())
        density = shares.new_tensor([probe.density for probe in self.probes])
        add_loss_term(self.alpha * ((shares - shares.detach()) * density).sum())
        add_loss_term(self.gamma * torch.cat([weight.current_weight() for weight in self.weights]).mean())

    def _shares(self) -> list[Tensor]:
        """w_l over the sum of its stack."""
        stacks = [probe.mlp.block_list for probe in self.probes]
        now = [weight.current_weight() for weight in self.weights]
        return [
            one / torch.cat([w for w, other in zip(now, stacks, strict=True) if other == stack]).sum()
            for one, stack in zip(now, stacks, strict=True)
        ]


def register_mlp_weights(model: nn.Module, mlps: Sequence[MlpLayers]) -> list[str]:
    """Register a trained theta in each MLP's scope, and return the parameters' names."""
    for mlp in mlps:
        model.get_submodule(mlp.parent).register_parameter(_THETA, nn.Parameter(torch.tensor([4 / _SPEED])))
    return [f"{mlp.parent}.{_THETA}" for mlp in mlps]


def attach_mlp_weights(
    model: nn.Module, probes: list[DensityProbe], alpha: float, gamma: float, below: float
) -> MlpWeightLoss:
    """Multiply each MLP's output by its weight, and add the loss terms after each forward pass."""
    weights = [MlpWeight(model.get_parameter(f"{probe.mlp.parent}.{_THETA}"), below) for probe in probes]
    for probe, weight in zip(probes, weights, strict=True):
        model.get_submodule(probe.mlp.down_projection).register_forward_hook(weight)
    terms = MlpWeightLoss(probes, weights, alpha, gamma)
    model.register_forward_hook(terms)
    return terms


@torch.no_grad()
def merge_mlp_weights(model: nn.Module, terms: MlpWeightLoss) -> None:
    """Write the weights into the narrowing layers, and drop the MLPs that are skipped.

    A model that is exported with code already cannot have the code for dropped MLPs too; its MLPs stay, as zeros.
    """
    skipped, droppable = [], type(model).__module__.startswith("transformers.")
    for probe, weight in zip(terms.probes, terms.weights, strict=True):
        mlp, deployed = probe.mlp, weight.inference_weight()
        if deployed or not droppable:
            _multiply(model.get_submodule(mlp.down_projection), deployed)
        else:
            skipped.append((*mlp.up_projections, mlp.down_projection))
        del model.get_submodule(mlp.parent)._parameters[_THETA]
    if skipped:
        remove_mlps_for_export(model, _auto_class(model), skipped)


def _multiply(layer: nn.Module, factor: float) -> None:
    """Multiply the output of a linear layer permanently, and that of a low-rank pair beside it."""
    if isinstance(layer, LoraLayer):
        layer.base_layer = dequantise_linear(layer.get_base_layer())
        ups = [up for up in layer.lora_B.values() if isinstance(up, nn.Linear)]
        for part in (layer.base_layer, *ups):
            _multiply(part, factor)
        return
    for parameter in layer.parameters(recurse=False):
        parameter.mul_(factor)


def _auto_class(model: nn.Module) -> str:
    """The auto class of transformers that loads a model of this kind."""
    kinds = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForImageClassification)
    config: Any = model.config
    loads: dict[str, Any] = {kind.__name__: kind._model_mapping.get(type(config), None) for kind in kinds}
    return next(name for name, loaded in loads.items() if loaded is type(model))
