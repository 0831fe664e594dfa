"""Renormalise the activations of a merged model by changes to the tensors that are already written."""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.files import write_bytes_atomically
from fedtune.merging import MergeContext, MergeInput
from fedtune.offline_merge.model_inputs import EndpointStateDict
from fedtune.offline_merge.output_folder import OutputFolder
from fedtune.offline_merge.readers.model_reader import LazyStateDict
from fedtune.offline_merge.readers.safetensors_folder import SafetensorsModelReader
from fedtune.offline_merge.run_merge import PreparedMerge, shares_of
from fedtune.offline_merge.safetensors_layout import fits, too_large
from fedtune.wire.client_update import pack

__all__ = ["renormalise_output"]


def renormalise_output(
    merge: PreparedMerge, output: OutputFolder, parts: Sequence[MergeInput], context: MergeContext
) -> None:
    """Run the renormalise steps. Each step's changes are on disk before the first of them is written."""
    base = merge.base if merge.is_delta_merge else None
    ends = [(part.weight, EndpointStateDict(merge.output_tensors, base, part)) for part in shares_of(parts)]
    for place, step in enumerate(merge.steps.renormalise):
        kept = _changes(output.folder, place)
        if not kept.is_file():
            files = tuple(sorted(output.folder.glob("*.safetensors")))
            merged = LazyStateDict(SafetensorsModelReader(output.folder, str(output.folder), files))
            write_bytes_atomically(kept, pack(step.renormalise(merged, ends, context)))
        for name, tensor in safetensors.torch.load_file(kept).items():
            output.write_rows(name, 0, _fitting(merge, name, tensor.to(torch.float32)))
        output.flush()
    for place in range(len(merge.steps.renormalise)):
        _changes(output.folder, place).unlink()


def _fitting(merge: PreparedMerge, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor; ModelError if it is not finite in the result's data type."""
    dtype = next(target.form.dtype for target in merge.output_tensors if target.name == name)
    if not fits(tensor, dtype):
        raise ModelError(too_large(name, tensor, dtype))
    return tensor


def _changes(folder: Path, place: int) -> Path:
    return folder / f"renormalise-{place}.changes"
