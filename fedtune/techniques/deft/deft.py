"""DEFT: add a loss term that makes the activations of MLPs sparse while another technique fine-tunes.

What: loss = task + density_weight D. D is the mean over layers, tokens and units of s(a) = a^2 / (a^2 + eps), a smooth
count of the non-zero activations. The activation a is the input of the MLP's down projection. DEFT trains nothing
itself.
Saves: nothing during training, and no time on dense hardware after it. A zero activation saves work only if its row of
the down projection is skipped. Training stores no more activation memory than without DEFT: D is reduced inside the
layer, and its gradient needs only what is stored anyway (ReLU's output, the input of another activation, the two
factors of a gated MLP). ``skip_mlps`` is an exception: the gradients of its weights need the output of each MLP.
Sends: what the other technique sends; with ``skip_mlps`` also one number per MLP.
Use when: the deployed model can skip zero activations, or you want to remove MLPs (``skip_mlps``).
Avoid when: the activation is GELU and the run is short. GELU's zeros come from underflow, which takes very long
training to reach; replace GELU by ReLU (``replace_with_relu``). If ``density_weight`` is too large, the task fails
without an error: watch the accuracy.
Figures: fractions (0..1) of non-zero activations during scoring, averaged first over all examples of a layer and then
over layers; encoder and decoder are separate. ``density`` counts real tokens. ``density_padded`` counts all positions,
as the authors do. ``density_above_threshold`` is the fraction after the threshold is applied; the accuracy is then that
of the model with the threshold. ``density_gate`` is the density of the gate of a gated MLP. GELU's figures depend on
the precision and on its formula.
Source: Runwal, Pedapati and Chen, "From PEFT to DEFT" (arXiv 2402.01911), and the authors' code: s, alpha = 1
(``density_weight``), eps = 1e-7, encoder and decoder each with weight 1. Headline: the density is 50.72 % (first
version) or 44.94 % (second) below that of the same PEFT without the term.
Ours: padding does not count, and tokens have equal weight, not texts. In gated MLPs (SwiGLU) the term applies to the
product, not to the gate. The product P is measured in units c_l of its layer: the root mean square of the step's own
|P|, clipped at its 99th percentile and constant for the gradient. This needs no calibration text, so the rule is the
same on every client and after a resume. Because c_l follows the scale of P, shrinking P does not lower D. ``eps_start``
anneals eps geometrically over the run. ``replace_with_relu`` also changes the exported configuration. ``skip_mlps``
follows ADA-DEFT: the abstract says that layer-wise weights are learned and MLPs skipped; the parametrisation,
regulariser and bound are ours (_mlp_weights.py). An export without some MLPs includes its own code, because no
configuration of transformers can describe it. Dropout between the product and the down projection (a gated T5) counts
as zeros, and training must store that product. T5's decoder uses the padding of the encoder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fedtune.errors import ModelError
from fedtune.recipe.schema import SettingsModel
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique, unfreeze_parameters
from fedtune.techniques.deft._density_probe import (
    ActivationCounts,
    DensityProbe,
    attach_probes,
    count_activations,
    detach_hooks,
)
from fedtune.techniques.deft._mlp_weights import (
    MlpWeight,
    MlpWeightLoss,
    attach_mlp_weights,
    merge_mlp_weights,
    register_mlp_weights,
)
from fedtune.techniques.deft._mlps import MlpLayers, find_mlps

__all__ = ["Deft", "SkipMlps", "get_probes"]


class SkipMlps(SettingsModel):
    """Scale each MLP's output by a trained weight and drop MLPs with small weights (ADA-DEFT-style)."""

    penalty: float = Field(0.1, ge=0, description="penalty that moves the weights towards zero")
    skip_below: float = Field(0.1, gt=0, lt=1, description="an MLP with a smaller weight is dropped")


class Deft(Technique):
    """Train for fewer non-zero activations."""

    name: ClassVar[str] = "deft"
    has_exact_gradients: ClassVar[bool] = False
    unsupported_devices: ClassVar[Mapping[str, str]] = {"mps": "which has no double precision"}
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True

    density_weight: float = Field(1.0, ge=0, description="weight of the density in the loss; 0: the loss is unchanged")
    eps: float = Field(1e-7, ge=1e-12, description="activations far below its root count as zero")
    eps_start: float | None = Field(None, ge=1e-12, description="anneal eps geometrically from here over the run")
    replace_with_relu: bool = Field(
        False, description="replace the activation function of MLPs (of the gate, if gated) by ReLU"
    )
    inference_threshold: float = Field(
        0.0, ge=0, description="activations up to this value are set to zero during scoring"
    )
    skip_mlps: SkipMlps | None = None

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Find the MLPs, replace their activation function, and add the trained weights."""
        mlps = find_mlps(model)
        if self.replace_with_relu:
            _swap(model, mlps)
        if self.skip_mlps is not None:
            unfreeze_parameters(model, register_mlp_weights(model, mlps))

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Add hooks to the layers after all techniques have rewritten the model."""
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
        """Set epsilon and exclude the padding."""
        start = self.eps if self.eps_start is None else self.eps_start
        for probe in get_probes(model):
            probe.forget_factors()
        get_probes(model)[0].step.begin_step(batch, start * (self.eps / start) ** progress)
        if (weights := _weights(model)) is not None:
            weights.begin_step()

    @contextmanager
    def collect_metrics(self, model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
        """Count non-zero activations."""
        with count_activations(get_probes(model)) as tallies:
            yield lambda: self._figures(model, tallies)

    def has_unchanged_base(self) -> bool:
        """Return False with another activation function or weighted MLPs."""
        return not self.replace_with_relu and self.skip_mlps is None

    def _fold(self, model: nn.Module) -> None:
        """Merge the weights into the down projections, drop MLPs below the bound, and remove the hooks."""
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
    """Name a stack of blocks by its parent, or by its own name if the parents are the same."""
    owners = [name.split(".")[-2] if "." in name else "" for name in stacks]
    owner = owners[stacks.index(stack)]
    return owner if owner and owners.count(owner) == 1 else stack.replace(".", "_")


def _swap(model: nn.Module, mlps: Sequence[MlpLayers]) -> None:
    """Replace each activation by ReLU, also in every field of the configuration that names it."""
    old = type(model.get_submodule(mlps[0].activation))
    config: Any = model.config
    for key, value in config.to_dict().items():
        if isinstance(value, str) and value in ACT2FN and type(ACT2FN[value]) is old:
            setattr(config, key, "relu")
    for mlp in mlps:
        model.set_submodule(mlp.activation, nn.ReLU())
    _check_swap(model, mlps[0])


def _check_swap(model: nn.Module, mlp: MlpLayers) -> None:
    """Check that a model built from the configuration uses ReLU; otherwise an export would differ."""
    kind, config = type(model), cast("Any", model.config)
    with torch.device("meta"):
        rebuilt: nn.Module = kind(type(config).from_dict(config.to_dict()))
    if not isinstance(rebuilt.get_submodule(mlp.activation), nn.ReLU):
        raise ModelError(
            f"the configuration of {type(model).__name__} cannot describe ReLU; unset deft's replace_with_relu"
        )
