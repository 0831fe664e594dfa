"""Task vectors: what a task changed of the state before any training, and their merge into one state."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune.continual._consolidation import HeldTensors, merge_onto
from fedtune.merging import MergeContext, MergeInput, MergePipeline

__all__ = ["compute_task_vector", "merge_task_vectors"]

Tensors = Mapping[str, Tensor]


def compute_task_vector(start: Tensors, end: Tensors) -> dict[str, Tensor]:
    """Return the end minus the start, fp32, for the tensors of real numbers."""
    return {name: end[name].float() - start[name].float() for name in end if end[name].is_floating_point()}


def merge_task_vectors(
    pipeline: MergePipeline, start: Tensors, vectors: Sequence[Tensors], round_number: int = 0
) -> dict[str, Tensor]:
    """Return the start with the merged task vectors, in the data types of the start. All vectors weigh the same."""
    weights = pipeline.combine.compute_client_weights([1] * len(vectors))
    operands = [MergeInput(HeldTensors(vector), weight) for vector, weight in zip(vectors, weights, strict=True)]
    base = {name: start[name] for name in vectors[0]}
    merged = merge_onto(pipeline, base, operands, MergeContext(round_number=round_number))
    return {**start, **{name: tensor.to(start[name].dtype) for name, tensor in merged.items()}}
