"""DEFT: a term in the loss that makes the MLPs' activations sparse while any other technique fine-tunes.

What: loss = task + alpha D, D = mean over layers, tokens and units of s(a) = a^2 / (a^2 + eps), a smooth count of the
activations that are not zero; a is what the narrowing layer of each MLP reads. Trains nothing itself.
Saves: nothing while training, and no time on dense hardware afterwards: a zero saves work only where its row of the
narrowing layer is skipped. Training keeps no more bytes than without: D is reduced inside the layer, and what its
gradient needs (ReLU's output, another activation's input, the two factors of a gated MLP) is kept anyway. ``skip_mlps``
is the exception: the gradient of its weights needs what each MLP gives.
Sends: what the technique beside it sends; with ``skip_mlps`` also one number per MLP.
Use when: the model is deployed where sparse activations are skipped, or MLPs are to be dropped (``skip_mlps``).
Avoid when: activations are GELU and the run is short: exact zeros of GELU are underflow, which takes very long training
to reach; swap in ReLU (``replace_with_relu``). Too large an alpha ruins the task silently: watch the accuracy.
Figures: shares 0..1 of non-zero activations while scoring, first all examples of a layer, then the mean over layers
(encoder and decoder apart): ``density`` over real tokens, ``density_padded`` over all positions as the authors count,
``density_above_threshold`` what is left once the threshold is applied (and the accuracy is that of the model with it
applied), ``density_gate`` of a gated MLP's gate alone. GELU's figures depend on the precision and on its formula.
Source: Runwal, Pedapati and Chen, "From PEFT to DEFT" (arXiv 2402.01911), and the authors' code: s, alpha = 1,
eps = 1e-7, encoder and decoder each with weight 1. Headline: density 50.72 % (first version) or 44.94 % (second) below
the same PEFT without the term.
Ours: padding does not count, and tokens weigh alike rather than texts. Gated MLPs (SwiGLU) are followed at the product,
not at the gate, in units c_l of the layer: the root mean square of the step's own |P| clipped at its 99th percentile,
constant for the gradient. It needs no calibration text, so it is the same rule on every client and after a resume, and
as it follows the scale of P, shrinking P is no way to a smaller D. ``eps_start`` anneals eps geometrically over the
run. ``replace_with_relu`` swaps the activation, also in the exported configuration. ``skip_mlps`` is ADA-DEFT-style:
the abstract says that layer-wise weights are learned and MLPs skipped; parametrisation, regulariser and bound are ours
(_mlp_weights.py), and an export that lost MLPs brings its code along, for no configuration of transformers can say so.
Dropout between product and narrowing layer (a gated T5) counts as zeros and makes training keep that product; T5's
decoder is counted with the encoder's padding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fedtune.errors import ModelError
from fedtune.recipe import SettingsModel, TaskName
from fedtune.techniques._mlp_weights import (
    MlpWeight,
    MlpWeightLoss,
    attach_mlp_weights,
    merge_mlp_weights,
    register_mlp_weights,
)
from fedtune.techniques._mlps import MlpLayers, find_mlps
from fedtune.techniques._probe import ActivationCounts, DensityProbe, attach_probes, count_activations, detach_hooks
from fedtune.techniques._technique import Technique, unfreeze_parameters

__all__ = ["Deft", "SkipMlps", "get_probes"]


class SkipMlps(SettingsModel):
    """Weigh each MLP's output by a trained number and drop those that become small (ADA-DEFT-style)."""

    penalty: float = Field(0.1, ge=0, description="how hard the weights are pressed towards zero")
    skip_below: float = Field(0.1, gt=0, lt=1, description="an MLP of smaller weight is dropped")


class Deft(Technique):
    """Fewer non-zero activations."""

    name: ClassVar[str] = "deft"
    selects_trainable_tensors: ClassVar[bool] = False

    density_weight: float = Field(1.0, ge=0, description="weight of the density in the loss; 0 leaves the loss alone")
    eps: float = Field(1e-7, ge=1e-12, description="activations far below its root count as zero")
    eps_start: float | None = Field(None, ge=1e-12, description="anneal eps geometrically from here over the run")
    replace_with_relu: bool = Field(
        False, description="swap the MLPs' activation function (the gate's, if gated) for ReLU"
    )
    inference_threshold: float = Field(
        0.0, ge=0, description="activations up to it are zeroed whenever the model is scored"
    )
    skip_mlps: SkipMlps | None = None

    def rewrite_model(self, model: nn.Module, task: TaskName, seed: int) -> None:
        """Find the MLPs, swap their activation function, add the trained weights."""
        mlps = find_mlps(model)
        if self.replace_with_relu:
            _swap(model, mlps)
        if self.skip_mlps is not None:
            unfreeze_parameters(model, register_mlp_weights(model, mlps))

    def begin_round(self, model: nn.Module, number: int) -> None:
        """Hang probes on the layers as all techniques have left them."""
        if "deft" in vars(model):
            return
        made = attach_probes(model, self.density_weight, self.inference_threshold)
        weights = (
            attach_mlp_weights(model, made, self.density_weight, self.skip_mlps.penalty, self.skip_mlps.skip_below)
            if self.skip_mlps
            else None
        )
        vars(model)["deft"] = made, weights

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Set epsilon, and leave the padding out."""
        start = self.eps if self.eps_start is None else self.eps_start
        get_probes(model)[0].step.begin_step(batch, start * (self.eps / start) ** progress)
        if (weights := _weights(model)) is not None:
            weights.begin_step()

    @contextmanager
    def collect_metrics(self, model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
        """Count non-zero activations."""
        with count_activations(get_probes(model)) as tallies:
            yield lambda: self._figures(model, tallies)

    def has_unchanged_base(self) -> bool:
        """Not with another activation function or weighted MLPs."""
        return not self.replace_with_relu and self.skip_mlps is None

    def _fold(self, model: nn.Module) -> None:
        """Write the weights into the narrowing layers, drop the MLPs below the bound, take the hooks away."""
        weights = _weights(model)
        detach_hooks(model, (DensityProbe, MlpWeight, MlpWeightLoss))
        if weights is not None:
            merge_mlp_weights(model, weights)
        del vars(model)["deft"]

    def _figures(self, model: nn.Module, tallies: list[ActivationCounts]) -> dict[str, float]:
        figures = _densities(get_probes(model), tallies)
        if (weights := _weights(model)) is None:
            return figures
        deployed = [weight.inference_weight() for weight in weights.weights]
        return {**figures, "mlps_skipped": float(deployed.count(0.0)), "mlp_weight": sum(deployed) / len(deployed)}


def get_probes(model: nn.Module) -> list[DensityProbe]:
    """The probes of a model, one per MLP."""
    made: list[DensityProbe] = vars(model)["deft"][0]
    return made


def _weights(model: nn.Module) -> MlpWeightLoss | None:
    weights: MlpWeightLoss | None = vars(model)["deft"][1]
    return weights


def _densities(made: Sequence[DensityProbe], tallies: Sequence[ActivationCounts]) -> dict[str, float]:
    thresholded = any(probe.threshold for probe in made)
    stacks = list(dict.fromkeys(probe.mlp.block_list for probe in made))
    figures: dict[str, float] = {}
    for stack in stacks:
        suffix = f"_{_called(stack, stacks)}" if len(stacks) > 1 else ""
        of = [tally for probe, tally in zip(made, tallies, strict=True) if probe.mlp.block_list == stack]
        shares = {
            "density": [tally.nonzero / max(1, tally.entries) for tally in of],
            "density_padded": [tally.padded_nonzero / max(1, tally.padded_entries) for tally in of],
            "density_above_threshold": [tally.above / max(1, tally.entries) for tally in of] if thresholded else [],
            "density_gate": [tally.gate / max(1, tally.entries) for tally in of] if made[0].mlp.is_gated else [],
        }
        figures |= {f"{name}{suffix}": sum(share) / len(share) for name, share in shares.items() if share}
    return figures


def _called(stack: str, stacks: Sequence[str]) -> str:
    """What a stack of blocks is called among several: what holds it, or its own name where that tells none apart."""
    owners = [name.split(".")[-2] if "." in name else "" for name in stacks]
    owner = owners[stacks.index(stack)]
    return owner if owner and owners.count(owner) == 1 else stack.replace(".", "_")


def _swap(model: nn.Module, mlps: Sequence[MlpLayers]) -> None:
    """ReLU in place of each activation, and in every field of the configuration that names it."""
    old = type(model.get_submodule(mlps[0].activation))
    config: Any = model.config
    for key, value in config.to_dict().items():
        if isinstance(value, str) and value in ACT2FN and type(ACT2FN[value]) is old:
            setattr(config, key, "relu")
    for mlp in mlps:
        model.set_submodule(mlp.activation, nn.ReLU())
    _check_swap(model, mlps[0])


def _check_swap(model: nn.Module, mlp: MlpLayers) -> None:
    """A model built from the configuration has to have ReLU there, or an export would be another function."""
    kind, config = type(model), cast("Any", model.config)
    with torch.device("meta"):
        rebuilt: nn.Module = kind(type(config).from_dict(config.to_dict()))
    if not isinstance(rebuilt.get_submodule(mlp.activation), nn.ReLU):
        raise ModelError(
            f"the configuration of {type(model).__name__} cannot say ReLU; leave deft's replace_with_relu out"
        )
