"""How far a merged DoRA adapter is from the merge of what its adapters do to the base.

DoRA scales each row of W + s B A to a length of its own (arXiv 2402.09353, equation 5), so that the mean of adapters'
factors and the mean of their lengths, taken apart, do not make the mean of the weights. Only the base can tell how far
they are from it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.merging import CombineStep, MergeContext, MergeInput, bind_combine
from fedtune.offline_merge.readers.adapter_model import AdapterModelReader, read_base_model_name
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.readers.open_model import open_base
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Missed", "missed_by_dora"]


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


def missed_by_dora(
    folders: Sequence[Path],
    made: Path,
    modules: Sequence[str],
    step: CombineStep,
    weights: Sequence[float],
    knobs: Sequence[Mapping[str, float]],
) -> Mapping[str, Missed] | None:
    """By module, what the adapter in ``made`` misses of ``folders`` merged as whole models.

    None where the base is not at hand.
    """
    try:
        base = open_base(read_base_model_name(folders[0]))
        inputs = [AdapterModelReader(folder, str(folder), base) for folder in folders]
        result = AdapterModelReader(made, str(made), base)
    except FedtuneError:
        return None
    before = inputs[0].base
    told = zip(inputs, weights, knobs, strict=True)
    dense = [MergeInput(_Change(adapted, before), weight, own) for adapted, weight, own in told]
    names = {module: result.weight_of(module) for module in modules}
    shapes = {name: before.tensor_infos[name].shape for name in names.values()}
    step, dense_parts = bind_combine(step, shapes, dense, MergeContext())
    found = _Change(result, before)
    return {module: _missed(name, shapes[name], step, dense_parts, found) for module, name in names.items()}


def _missed(
    name: str, shape: tuple[int, ...], step: CombineStep, operands: Sequence[MergeInput], found: _Change
) -> Missed:
    missed = whole = 0.0
    for (start, stop), wanted in zip(iter_row_chunks(shape), step.combine(name, shape, operands), strict=True):
        missed += float((found(name, start, stop) - wanted).double().square().sum())
        whole += float(wanted.double().square().sum())
    return Missed(missed**0.5, whole**0.5)
