"""A delta of the server's own, beside which a robust merge sees the models."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.merging._step import MergeInput, Shape

__all__ = ["make_reference_input"]


def make_reference_input(reference: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> MergeInput:
    """The reference as a model of weight zero. Tensors that it lacks are zero."""

    def read_rows(name: str, start: int, stop: int) -> Tensor:
        if name not in reference:
            return torch.zeros(stop - start, *shapes[name][1:])
        tensor = reference[name]
        return tensor[start:stop] if tensor.dim() else tensor

    return MergeInput(read_rows, 0.0)
