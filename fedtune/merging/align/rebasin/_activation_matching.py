"""Activation matching: find the orders of units whose activations agree best between two models.

Li et al. (arXiv 1511.07543): Pearson correlation of units over data. The assignment of one layer does not depend on the
others, so one pass over the data is enough. Units are measured where the next layer reads them, after the nonlinearity
and any pooling. No layer reads queries and keys, so these are measured at the output of their own layer. Every position
of a feature map or a text is a sample.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.merging._layer_hooks import hook_layers, use_state_dict
from fedtune.merging.align.rebasin._assignment import GainMatrices, compute_total_gain, solve_assignment
from fedtune.merging.align.rebasin._permutations import Permutations, PermutationSpec, PermutedAxis
from fedtune.merging.align.rebasin._weight_matching import TensorReader

__all__ = ["ActivationComparison", "compute_similarities", "match_activations"]


class ActivationComparison(NamedTuple):
    """The network and the data on which activations of two models are compared, and the measure of similarity.

    The network runs with the weights of each model in turn; its own are restored afterwards.
    """

    net: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    similarity: Literal["pearson", "inner"]


class _Site(NamedTuple):
    """The input or output of a layer, and the axis of its weight that lists these units."""

    layer: str
    reads: bool
    axis: PermutedAxis
    part: str


class _PairMoments:
    """Sums over samples of two models' units, in double precision."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2, size, dtype=torch.float64)
        self.squares = torch.zeros(2, size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Samples [m, n] of both."""
        self.count += len(ours)
        self.sums += torch.stack([ours.sum(0), theirs.sum(0)])
        self.squares += torch.stack([ours.square().sum(0), theirs.square().sum(0)])
        self.products.addmm_(ours.T, theirs)

    def compute_inner_products(self) -> Tensor:
        """E[a b^T] [n, n]."""
        return self.products / self.count

    def compute_correlations(self) -> Tensor:
        """Correlations [n, n]; those of units that do not vary are 0."""
        mean = self.sums / self.count
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        dead = deviation <= 1e-7 * (self.squares / self.count).sqrt()
        scale = torch.where(dead, torch.zeros(()), 1 / deviation)
        return (self.compute_inner_products() - torch.outer(mean[0], mean[1])) * torch.outer(scale[0], scale[1])


def match_activations(
    symmetry: PermutationSpec,
    reference: TensorReader,
    model: TensorReader,
    start: Permutations,
    comparison: ActivationComparison,
) -> tuple[Permutations, float, float]:
    """The best orders, and the similarity of all units together before and after."""
    found = compute_similarities(symmetry, reference, model, comparison)
    orders = {name: solve_assignment(kind, found[name]) for name, kind in symmetry.kinds.items()}
    before, after = (sum(compute_total_gain(one[name], found[name]) for name in found) for one in (start, orders))
    return orders, before, after


def compute_similarities(
    symmetry: PermutationSpec, reference: TensorReader, model: TensorReader, comparison: ActivationComparison
) -> dict[str, GainMatrices]:
    """The similarity of all pairs of units for each permutation and part, summed over sites."""
    net, batches, similarity = comparison
    sites = _list_sites(symmetry, net)
    moments = {site: _PairMoments(symmetry.kinds[site.axis.permutation].parts[site.part]) for site in sites}
    states = [{name: read(name) for name in symmetry.axes} for read in (reference, model)]
    for batch in batches:
        ours, theirs = (_collect_units(net, state, batch, sites, symmetry) for state in states)
        for site in sites:
            moments[site].add(ours[site], theirs[site])
    return {name: _sum_over_sites(symmetry, name, moments, similarity) for name in symmetry.kinds}


def _sum_over_sites(
    symmetry: PermutationSpec, permutation: str, moments: Mapping[_Site, _PairMoments], similarity: str
) -> GainMatrices:
    found = {
        part: torch.zeros(size, size, dtype=torch.float64) for part, size in symmetry.kinds[permutation].parts.items()
    }
    for site, seen in moments.items():
        if site.axis.permutation == permutation:
            found[site.part] += (
                seen.compute_correlations() if similarity == "pearson" else seen.compute_inner_products()
            )
    return found


def _list_sites(symmetry: PermutationSpec, net: nn.Module) -> list[_Site]:
    """The inputs of layers that read each part of each permutation; the outputs of layers where none reads it."""
    reading, making = [], []
    for name, axes in symmetry.axes.items():
        layer = net.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is not None and len(axes) > 1 and not isinstance(layer, (nn.Embedding, nn.LayerNorm)):
            inputs, outputs = _directions(layer)
            reading += _make_sites(axes[inputs], name, reads=True)
            making += _make_sites(axes[outputs], name, reads=False)
    read = {(site.axis.permutation, site.part) for site in reading}
    return reading + [site for site in making if (site.axis.permutation, site.part) not in read]


def _make_sites(axis: PermutedAxis | None, name: str, *, reads: bool) -> list[_Site]:
    return [_Site(name.removesuffix(".weight"), reads, axis, part) for part in axis.parts] if axis else []


def _directions(layer: nn.Module) -> tuple[int, int]:
    """The axes of a weight that count inputs and outputs; they are swapped in Conv1D of transformers."""
    if type(layer).__name__ == "Conv1D":
        return 0, 1
    depthwise = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1
    return (0, 0) if depthwise else (1, 0)


def _collect_units(
    net: nn.Module,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    sites: Sequence[_Site],
    symmetry: PermutationSpec,
) -> dict[_Site, Tensor]:
    """Each site's units as samples [m, n] in double precision."""
    seen: dict[_Site, Tensor] = {}

    def note(layer: str, inputs: Tensor, output: Tensor) -> None:
        for site in (site for site in sites if site.layer == layer):
            values = inputs if site.reads else output
            convolves = isinstance(net.get_submodule(layer), nn.modules.conv._ConvNd)
            seen[site] = _samples(values.cpu(), 1 if convolves else values.dim() - 1, site, symmetry)

    with use_state_dict(net, state), hook_layers(net, {site.layer for site in sites}, note), torch.no_grad():
        net(**move_tensors(batch, find_device(net)))
    return seen


def _samples(values: Tensor, channels: int, site: _Site, symmetry: PermutationSpec) -> Tensor:
    units = dict(site.axis.split_into_rows(values, channels, symmetry.kinds[site.axis.permutation]))
    return units[site.part].T
