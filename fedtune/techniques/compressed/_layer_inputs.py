"""Give the layers that save their input a codec, by their kind."""

from collections.abc import Iterator, Mapping

from torch import nn

from fedtune.errors import ModelError
from fedtune.techniques._codecs.saved_inputs import InputCodec, attach_codec, has_codec
from fedtune.techniques._codecs.saved_tensors import SharedPackings

__all__ = ["RECOMPUTED", "InputCodecs", "attach_codecs", "list_kinds"]

InputCodecs = Mapping[str, InputCodec]
"""A codec for each kind of layer: ``matrix``, ``convolution``, ``norm``, ``batch_norm`` and ``activation``."""

RECOMPUTED: Mapping[str, str] = {
    "chunked-mlp": "MLPs that are recomputed keep no activations in another form",
    "gradient-checkpointing": "recomputed blocks keep no activations in another form",
    "meft": "reversible blocks keep no activations in another form",
    "selective-checkpointing": "it decides which activations the same blocks store",
    "activation-pruning": "both decide what layers store of their inputs",
}
"""Why a technique that keeps inputs in another form cannot be combined with others."""

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def list_kinds(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Return the layers whose inputs may be saved, with their kind, but not those that another technique runs."""
    for layer in model.modules():
        kind = _find_kind(layer)
        if kind is not None and ("forward" not in vars(layer) or has_codec(layer)):
            yield layer, kind


def _find_kind(layer: nn.Module) -> str | None:
    name = type(layer).__name__
    if isinstance(layer, nn.Linear) or name == "Conv1D":
        return "matrix"
    if isinstance(layer, nn.Conv2d):
        return "convolution"
    if isinstance(layer, nn.BatchNorm2d):
        return "batch_norm"
    if name.endswith("Norm") and [one.dim() for one in layer.parameters()] in ([1], [1, 1]):
        return "norm"
    return "activation" if type(layer).__module__ in _ACTIVATIONS and not list(layer.parameters()) else None


def attach_codecs(model: nn.Module, codecs: InputCodecs, name: str) -> None:
    """Let layers keep their inputs by the codecs of their kinds; ModelError if there is no such layer."""
    shared = SharedPackings()
    found = [(layer, codecs[kind]) for layer, kind in list_kinds(model) if kind in codecs]
    if not found:
        raise ModelError(f"{type(model).__name__} has no layer whose input {name} could keep; leave the technique out")
    for layer, codec in found:
        attach_codec(layer, codec, shared)
