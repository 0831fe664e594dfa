"""Hooks on each MLP: they add density terms in training, and apply thresholds and count in evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.techniques._loss_terms import add_loss_term
from fedtune.techniques.deft._activation_density import (
    Recompute,
    compute_density,
    count_nonzero_per_token,
    estimate_activation_scale,
    sample_magnitudes,
)
from fedtune.techniques.deft._mlps import MlpLayers, find_mlps

__all__ = [
    "ActivationCounts",
    "DensityProbe",
    "DensityStep",
    "attach_probes",
    "calibrate_thresholds",
    "count_activations",
    "detach_hooks",
]


@dataclass(eq=False)
class DensityStep:
    """Values that all probes of a model share: the step's epsilon, and the mask of counted tokens (None: all)."""

    eps: float
    counted: Tensor | None = None
    tokens: int | None = None

    def begin_step(self, batch: Mapping[str, Tensor], eps: float) -> None:
        """Take the padding from a batch's attention mask, if it has one."""
        mask = batch.get("attention_mask")
        counted = None if mask is None else mask.flatten().bool()
        self.eps, self.tokens = eps, None if counted is None else len(counted)
        self.counted = None if counted is None or bool(counted.all()) else counted

    def get_token_mask(self, a: Tensor) -> Tensor | None:
        """``counted``, once it is sure to belong to these activations."""
        rows = a.numel() // a.shape[-1]
        if self.tokens not in (None, rows):
            raise ModelError(f"deft sees {rows} tokens where the step began with {self.tokens}; begin each step anew")
        return self.counted


@dataclass
class ActivationCounts:
    """Sums over the scored examples: all and non-zero entries of counted tokens, and of all tokens (``padded``)."""

    entries: int = 0
    nonzero: int = 0
    above: int = 0
    gate: int = 0
    padded_entries: int = 0
    padded_nonzero: int = 0

    def add_activations(self, a: Tensor, counted: Tensor | None, threshold: float) -> None:
        """Count one batch's activations."""
        found = count_nonzero_per_token(a)
        self.entries += (len(found) if counted is None else int(counted.sum())) * a.shape[-1]
        self.nonzero += _sum(found, counted)
        self.above += _sum(count_nonzero_per_token(a.abs() > threshold), counted)
        self.padded_entries += a.numel()
        self.padded_nonzero += _sum(found, None)

    def add_gates(self, gate: Tensor, counted: Tensor | None) -> None:
        """Count one batch's gates."""
        self.gate += _sum(count_nonzero_per_token(gate), counted)


@dataclass(eq=False)
class DensityProbe:
    """The hooks of one MLP. ``weight`` scales its loss term; ``density`` is the last density it measured.

    The product of a gated MLP is recomputed from its two factors, which the product stores anyway; ``remade`` says
    whether this was possible.
    """

    mlp: MlpLayers
    step: DensityStep
    weight: float
    threshold: float = 0.0
    tally: ActivationCounts | None = None
    sample: list[Tensor] | None = None
    can_recompute: bool | None = None
    density: float = field(default=0.0, init=False)
    _wide: list[Tensor] = field(default_factory=list, init=False)
    _gate: tuple[Tensor, ...] = field(default=(), init=False)

    def on_activation(self, activation: nn.Module, args: tuple[Any, ...], a: Tensor) -> Tensor:
        """Forward hook of a plain MLP's activation function."""
        if not activation.training:
            return self._score(a)
        # ReLU keeps its output for backward, every other function its input, from which the output is made again
        return self._emit(a) if isinstance(activation, nn.ReLU) else self._emit(a, activation, args[0])

    def on_up_projection(self, first: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """Forward hook of a gated MLP's two widening layers."""
        if self.can_recompute is not False and first.training and self.weight:
            self._wide.append(out)

    def on_gate(self, activation: nn.Module, args: tuple[Any, ...], gate: Tensor) -> None:
        """Forward hook of a gated MLP's activation function."""
        if self.can_recompute is not False and activation.training and self.weight:
            self._gate = args[0], gate
        if self.tally is not None:
            self.tally.add_gates(gate, self.step.get_token_mask(gate))

    def on_down_projection_input(self, second: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of a gated MLP's narrowing layer: its input is the product of gate and up projection."""
        if not second.training:
            return self._score(args[0]), *args[1:]
        factors = self._factors()
        if self.can_recompute is None and self.weight:
            self.can_recompute = len(factors) == 2 and torch.equal(torch.mul(*factors), args[0])
        product = self._emit(args[0], torch.mul, *factors) if self.can_recompute else self._emit(args[0])
        return product, *args[1:]

    def forget_factors(self) -> None:
        """Forget the factors of a forward pass that did not end."""
        self._gate, self._wide = (), []

    def _factors(self) -> tuple[Tensor, ...]:
        """The gate and the output of the up projection; they are not stored."""
        gate, wide = self._gate, self._wide
        self._gate, self._wide = (), []
        past = [out for out in wide if gate and out is not gate[0]]
        return tuple(one.detach() for one in (*gate[1:], *past))

    def _emit(self, a: Tensor, remake: Recompute | None = None, *kept: Tensor) -> Tensor:
        if not self.weight:
            return a
        counted = self.step.get_token_mask(a)
        unit = estimate_activation_scale(a, counted) if self.mlp.is_gated else 1.0
        eps = self.step.eps * max(unit**2, 1e-12)
        a, density = compute_density(a, eps, counted, remake, tuple(one.detach() for one in kept))
        self.density = float(density.detach())
        add_loss_term(self.weight * density)
        return a

    def _score(self, a: Tensor) -> Tensor:
        if self.tally is not None:
            self.tally.add_activations(a, self.step.get_token_mask(a), self.threshold)
        if self.sample is not None:
            self.sample.append(sample_magnitudes(a, self.step.get_token_mask(a), _SAMPLE))
        return a * (a.abs() > self.threshold) if self.threshold else a


_SAMPLE = 2**16
"""Magnitudes taken per batch and layer for a quantile."""


def attach_probes(model: nn.Module, weight: float, threshold: float) -> list[DensityProbe]:
    """Attach a probe to every MLP; the MLPs of one stack share ``weight``."""
    step = DensityStep(eps=1.0)
    mlps = find_mlps(model)
    sizes = {mlp.block_list: sum(other.block_list == mlp.block_list for other in mlps) for mlp in mlps}
    made = [DensityProbe(mlp, step, weight / sizes[mlp.block_list], threshold) for mlp in mlps]
    for probe in made:
        _attach_hooks(model, probe)
    return made


def _attach_hooks(model: nn.Module, probe: DensityProbe) -> None:
    activation = model.get_submodule(probe.mlp.activation)
    if not probe.mlp.is_gated:
        activation.register_forward_hook(probe.on_activation)
        return
    for first in probe.mlp.up_projections:
        model.get_submodule(first).register_forward_hook(probe.on_up_projection)
    activation.register_forward_hook(probe.on_gate)
    model.get_submodule(probe.mlp.down_projection).register_forward_pre_hook(probe.on_down_projection_input)


def detach_hooks(model: nn.Module, owners: tuple[type, ...]) -> None:
    """Remove all hooks that belong to objects of these classes."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), owners)]:
                del hooks[key]


@contextmanager
def count_activations(probes: Sequence[DensityProbe]) -> Iterator[list[ActivationCounts]]:
    """Count the activations of each MLP that are evaluated inside the block."""
    tallies = [ActivationCounts() for _ in probes]
    for probe, tally in zip(probes, tallies, strict=True):
        probe.tally = tally
    try:
        yield tallies
    finally:
        for probe in probes:
            probe.tally = None


@torch.no_grad()
def calibrate_thresholds(
    model: nn.Module, probes: Sequence[DensityProbe], batches: Sequence[Mapping[str, Tensor]], kept: float
) -> None:
    """The control without training: set each threshold so that a share ``kept`` of activations is above it."""
    for probe in probes:
        probe.threshold, probe.sample = 0.0, []
    model.eval()
    for batch in batches:
        probes[0].step.begin_step(batch, 1.0)
        model(**batch)
    for probe in probes:
        values = torch.cat(probe.sample or [])
        probe.threshold = float(values.kthvalue(max(1, round((1 - kept) * len(values)))).values)
        probe.sample = None


def _sum(found: Tensor, counted: Tensor | None) -> int:
    return int((found if counted is None else found[counted]).sum())
