"""Describe the matrices that no low-rank pair is attached to."""

from collections.abc import Collection, Iterator

import torch
from torch import nn

__all__ = ["describe_untargeted_matrices", "needs_conv_shapes"]

_WORTH_TELLING = 0.05


def needs_conv_shapes(model: nn.Module) -> bool:
    """Whether layers read the stride of a convolution, to pad as TensorFlow does."""
    return any(getattr(getattr(layer, "config", None), "tf_padding", False) for layer in model.modules())


def describe_untargeted_matrices(model: nn.Module, targets: Collection[str], head: Collection[str]) -> str:
    """The frozen matrices without a pair, as the end of a sentence; an empty text if they are few.

    Embeddings and the head do not count.
    """
    matrices = {name: size for name, size in _matrices(model) if name not in head}
    without = {name: size for name, size in matrices.items() if name.rpartition(".")[0] not in targets}
    share = sum(without.values()) / max(1, sum(matrices.values()))
    if share < _WORTH_TELLING:
        return ""
    kinds = sorted({_kind(model, name) for name in without})
    return (
        f"puts no pair beside {share:.0%} of the weights of {type(model).__name__}, which stay frozen: "
        f"{', '.join(kinds)}, such as {max(without, key=lambda name: without[name])}; take full to train them"
    )


def _matrices(model: nn.Module) -> Iterator[tuple[str, int]]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) or layer is output:
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:  # another technique's
                continue
            packed = 2 if parameter.dtype == torch.uint8 else 1  # four-bit weights lie in pairs, without a shape
            if (packed > 1 or parameter.squeeze().dim() > 1) and "embed" not in f"{path}.{name}":
                yield f"{path}.{name}", packed * parameter.numel()


def _kind(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, nn.modules.conv._ConvNd):
        return "convolutions"
    if isinstance(layer, nn.Linear):
        return "layers whose weights are read directly"
    return "experts" if "expert" in name else "other weights"
