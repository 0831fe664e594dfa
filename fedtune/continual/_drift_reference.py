"""The reference of each drift signal as tensors that add up: what clients send of their examples, and their scores.

centred  counts, sums and squares; plain: the same, as if all examples were of one class.
nac      how many examples have each feature's state in each bin.
scale    count, sum and sum of squares of the energies.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedtune.continual._drift_signals import (
    NAC_BINS,
    BatchScore,
    LastLayer,
    compute_centred_score,
    compute_coverage_score,
    compute_energies,
    compute_energy_score,
    compute_neuron_states,
    compute_plain_score,
    count_neuron_states,
    sum_energies,
)
from fedtune.continual._drift_sums import FeatureSums, compute_moments, sum_features
from fedtune.wire.client_update import TensorSpec

__all__ = ["compute_score", "declare_reference", "make_reference", "read_last_layer"]

Tensors = Mapping[str, Tensor]


def declare_reference(signal: str, width: int, num_labels: int) -> dict[str, TensorSpec]:
    """Return the form of a client's part of the reference."""
    if signal == "nac":
        return {"bins": TensorSpec((NAC_BINS, width), negative=False)}
    if signal == "scale":
        return {"energies": TensorSpec((3,), "F64")}
    classes = num_labels if signal == "centred" else 1
    counts, squares = TensorSpec((classes,), negative=False), TensorSpec((width,), negative=False)
    return {"counts": counts, "sums": TensorSpec((classes, width)), "squares": squares}


def make_reference(signal: str, features: Tensor, labels: Tensor | None, num_labels: int, layer: LastLayer) -> Tensors:
    """Return a client's part of the reference, in single precision except energies, which may hardly vary."""
    if signal == "scale":
        return {"energies": sum_energies(compute_energies(features, layer))}
    if signal == "nac":
        found: Tensors = {"bins": count_neuron_states(compute_neuron_states(features, layer))}
    else:
        found = sum_features(features, labels if signal == "centred" else None, num_labels)._asdict()
    return {name: tensor.float() for name, tensor in found.items()}


def compute_score(
    signal: str, features: Tensor, labels: Tensor | None, reference: Tensors, layer: LastLayer
) -> BatchScore | None:
    """Return the signal of a batch; None if the reference has seen none of its classes."""
    if signal == "nac":
        return compute_coverage_score(compute_neuron_states(features, layer), reference["bins"])
    if signal == "scale":
        return compute_energy_score(compute_energies(features, layer), reference["energies"])
    moments = compute_moments(FeatureSums(*(reference[name] for name in FeatureSums._fields)))
    if signal == "plain":
        return compute_plain_score(features, moments)
    assert labels is not None
    return compute_centred_score(features, labels, moments)


def read_last_layer(layer: nn.Module, classes: list[int] | None) -> LastLayer:
    """Return the weight and bias of the last layer, only of the classes in use."""
    weight = layer.get_parameter("weight").detach().float().cpu()
    bias = layer._parameters.get("bias")
    offset = torch.zeros(len(weight)) if bias is None else bias.detach().float().cpu()
    return LastLayer(weight, offset) if classes is None else LastLayer(weight[classes], offset[classes])
