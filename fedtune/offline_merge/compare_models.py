"""Compare the models of a merge before anything is written, in one pass over all tensors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging import compute_cosine_matrix, compute_norm_preserving_scale, count_opposing_signs
from fedtune.offline_merge.model_inputs import BaseReader, DeltaReader
from fedtune.offline_merge.run_merge import PreparedMerge, ProgressCallback
from fedtune.offline_merge.threads import one_thread
from fedtune.offline_merge.vocabularies import compare_vocabularies, has_same_tokenizer_file, read_vocabulary
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["ModelComparison", "Words", "compare_models"]

_MAX_RELATIVE_DELTA = 0.9
"""The relative norm of a delta above which the base is wrong. Two unrelated networks of equal norm have 1.4.

It is computed over matrices only. The scales of norm layers are near one in every network, and dominate a small one.
"""
_TOGETHER = 4
"""The number of models up to which pieces have their full size. With more models, pieces are smaller."""


@dataclass(frozen=True)
class Words:
    """How a model's vocabulary differs from that of the first model: tokens added, missing, and with another id."""

    more: int
    missing: int
    moved: int


@dataclass(frozen=True)
class ModelComparison:
    """Figures over all tensors that are merged.

    ``cosines`` [K, K] are between the deltas to the base, or between whole models if there is no base. ``conflicts`` is
    the fraction of entries at which two deltas have opposite signs. ``norms`` are the norms of the deltas relative to
    that of the base. ``changed`` counts the tensors that differ from the base, and ``first`` names the first of them.
    With ``scale``, the weighted sum of the deltas has the mean norm of the deltas.
    """

    models: list[str]
    cosines: list[list[float]]
    conflicts: float
    norms: list[float] | None
    changed: list[int] | None
    first: list[str | None] | None
    words: list[Words | None]
    scale: float | None
    tensors: int
    entries: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)


@one_thread()
def compare_models(merge: PreparedMerge, progress: ProgressCallback, *, trust_base: bool = False) -> ModelComparison:
    """Read every tensor once. Raises ModelError for values that are not finite, or if the base is the wrong one."""
    names = list(merge.models.fine_tuned) or list(merge.models.by_name)
    based = merge.models.base is not None
    sums = _Sums(len(names))
    for name, parts, base in _pieces(merge, names, progress):
        sums.add(name, parts, base, matrix=len(merge.models.by_name[names[0]].tensor_infos[name].shape) > 1)
        sums.entries += len(parts[0])
    for place, square in enumerate(sums.gram.diagonal().tolist()):
        if not math.isfinite(square):
            raise ModelError(f"{names[place]}: {sums.broken} holds values that are not finite; take another release")
    norms = (sums.gram.diagonal().sqrt() / math.sqrt(sums.base or 1.0)).tolist()
    if based and not trust_base:
        _check_base(merge, names, (sums.matrices.sqrt() / math.sqrt(sums.base_matrices or 1.0)).tolist())
    return ModelComparison(
        models=names,
        cosines=compute_cosine_matrix(sums.gram),
        conflicts=sums.conflicts / max(1, sums.entries),
        norms=norms if based else None,
        changed=[len(found) for found in sums.changed] if based else None,
        first=[next(iter(found), None) for found in sums.changed] if based else None,
        words=list(_words(merge, names)),
        scale=compute_norm_preserving_scale(sums.gram, _weights(merge, names)) if based else None,
        tensors=len(sums.seen),
        entries=sums.entries,
    )


class _Sums:
    """Sums over the pieces: inner products, opposite signs, and which tensors differ."""

    def __init__(self, count: int) -> None:
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        self.base = self.base_matrices = 0.0
        self.matrices = torch.zeros(count, dtype=torch.float64)
        self.conflicts = self.entries = 0
        self.changed: list[dict[str, None]] = [{} for _ in range(count)]
        self.seen: dict[str, None] = {}
        self.broken = ""

    def add(self, name: str, parts: Sequence[Tensor], base: Tensor | None, *, matrix: bool) -> None:
        """Add one piece [n] of each model, and of the base."""
        gram = _products(parts)
        if not self.broken and not bool(gram.isfinite().all()):
            self.broken = name
        self.gram += gram
        self.conflicts += count_opposing_signs(parts)
        self.seen[name] = None
        for place, found in enumerate(gram.diagonal().tolist()):
            if found:
                self.changed[place].setdefault(name)
        square = 0.0 if base is None else float(torch.dot(base, base))
        self.base += square
        if matrix:
            self.base_matrices += square
            self.matrices += gram.diagonal()


def _products(parts: Sequence[Tensor]) -> Tensor:
    """Return the inner products [K, K] of vectors. Each is summed in fp32."""
    found = torch.empty(len(parts), len(parts), dtype=torch.float64)
    for i, j in combinations_with_replacement(range(len(parts)), 2):
        found[i, j] = found[j, i] = float(torch.dot(parts[i], parts[j]))
    return found


def _pieces(
    merge: PreparedMerge, names: list[str], progress: ProgressCallback
) -> Iterator[tuple[str, list[Tensor], Tensor | None]]:
    """Yield the pieces of the tensors that all models and the base have, under the models' own names.

    Slices renumber layers in the result. The deltas to the base do not depend on this.
    """
    models = [merge.models.by_name[name] for name in names]
    shared = {name: name for name in models[0].tensor_infos if _shared(merge, name)}
    base = None if merge.models.base is None else BaseReader(merge.models.by_name[merge.models.base], shared)
    readers = [DeltaReader(model, shared, base) for model in models]
    done = 0
    for name in shared:
        form = models[0].tensor_infos[name]
        for start, stop in iter_row_chunks(form.shape, math.ceil(len(models) / _TOGETHER)):
            parts = [reader(name, start, stop).flatten() for reader in readers]
            yield name, parts, None if base is None else base.rows(name, start, stop).flatten()
        done += form.num_bytes
        progress(done)


def _shared(merge: PreparedMerge, name: str) -> bool:
    known = [model.tensor_infos.get(name) for model in merge.models.by_name.values()]
    first = known[0]
    return (
        first is not None
        and first.dtype.is_floating_point
        and all(form and form.shape == first.shape for form in known)
    )


def _check_base(merge: PreparedMerge, names: list[str], norms: list[float]) -> None:
    for name, norm in zip(names, norms, strict=True):
        if norm > _MAX_RELATIVE_DELTA:
            raise ModelError(
                f"{merge.models.base} is not the base of {name}: its matrices differ from it by {norm:.2f} times the "
                "base's own norm; name the base it was trained from, or say --trust-base"
            )


def _weights(merge: PreparedMerge, names: list[str]) -> Tensor:
    """Return each model's weight, without weights for single tensors."""
    entries = {entry.model: entry for entry in merge.config.model_entries}
    layers = [(entries[name].parameters, merge.config.parameters) for name in names]
    weights = [merge.steps.combine.bind_model(layer, "", 0.0).weight for layer in layers]
    return torch.tensor(weights, dtype=torch.float64)


def _words(merge: PreparedMerge, names: list[str]) -> Iterator[Words | None]:
    """Compare each model's vocabulary with that of the base, or of the first model."""
    folder = merge.models.first.tokens
    for name in names:
        own = merge.models.by_name[name].tokens
        if has_same_tokenizer_file(folder, own):
            yield Words(0, 0, 0)
            continue
        first, found = read_vocabulary(folder), read_vocabulary(own)
        yield None if first is None or found is None else Words(*compare_vocabularies(found, first))
