"""The error of a merged DoRA adapter, compared with the merge of the adapted weights.

DoRA scales each row of W + s B A to a learned length (arXiv 2402.09353, equation 5). The means of the factors and of
the lengths are therefore not the mean of the weights. The error depends on the base weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.merging import CombineStep, MergeContext, MergeInput, bind_combine
from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge
from fedtune.offline_merge.readers.adapter_model import AdapterModelReader, read_base_model_name
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.readers.open_model import open_base
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Missed", "compute_dora_errors"]


class Missed(NamedTuple):
    """Frobenius norms of what a module's change misses, and of what it should be."""

    missed: float
    whole: float


class _Change(NamedTuple):
    """What an adapter changes of the base, by the base's rows."""

    adapted: ModelReader
    base: ModelReader

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.adapted.rows(name, start, stop)
        return rows - self.base.rows(name, start, stop).reshape(rows.shape)


def compute_dora_errors(
    folders: Sequence[Path],
    made: Path,
    modules: Sequence[str],
    merge: AdapterMerge,
) -> Mapping[str, Missed] | None:
    """Compare the adapter in ``made`` with ``folders`` merged as whole models, by module.

    None if the base model is not available.
    """
    try:
        base = open_base(read_base_model_name(folders[0]))
        inputs = [AdapterModelReader(folder, str(folder), base) for folder in folders]
        result = AdapterModelReader(made, str(made), base)
    except FedtuneError:
        return None
    before = inputs[0].base
    each = zip(inputs, merge.weights, merge.overrides, strict=True)
    dense = [MergeInput(_Change(adapted, before), weight, overrides) for adapted, weight, overrides in each]
    names = {module: result.weight_of(module) for module in modules}
    shapes = {name: before.tensor_infos[name].shape for name in names.values()}
    step, dense_parts = bind_combine(merge.step, shapes, dense, MergeContext())
    found = _Change(result, before)
    return {module: _missed(name, shapes[name], step, dense_parts, found) for module, name in names.items()}


def _missed(
    name: str, shape: tuple[int, ...], step: CombineStep, inputs: Sequence[MergeInput], found: _Change
) -> Missed:
    missed = whole = 0.0
    for (start, stop), wanted in zip(iter_row_chunks(shape), step.combine(name, shape, inputs), strict=True):
        missed += float((found(name, start, stop) - wanted).double().square().sum())
        whole += float(wanted.double().square().sum())
    return Missed(missed**0.5, whole**0.5)
