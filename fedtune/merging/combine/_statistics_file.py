"""Statistics of single models, each read from a file and checked before the first tensor is merged."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ModelError, RecipeError, SourceError
from fedtune.merging._step import MergeInput, StatisticsReader

__all__ = ["StatisticsFile", "check_statistics", "require_statistics"]


class StatisticsFile:
    """The statistics of one model in a safetensors file, by the names of its tensors."""

    def __init__(self, path: Path) -> None:
        """Reads the names; SourceError when it is not a safetensors file."""
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                self._names = frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{path} is not a safetensors file ({error}); give a file of statistics") from error

    def __contains__(self, name: object, /) -> bool:
        """Whether the file holds it."""
        return name in self._names

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor's statistics, fp32."""
        with safe_open(self._path, "pt") as file:
            piece = file.get_slice(name)
            rows: Tensor = piece[start:stop] if piece.get_shape() else file.get_tensor(name)
        return rows.float()


def require_statistics(merge_input: MergeInput) -> StatisticsReader:
    """A model's statistics, after ``check_statistics``."""
    assert merge_input.statistics is not None
    return merge_input.statistics


def check_statistics(step: str, names: Iterable[str], merge_inputs: Sequence[MergeInput]) -> None:
    """Raises RecipeError if a model has no statistics, and ModelError if they name no tensor or different ones."""
    wanted = list(names)
    for number, merge_input in enumerate(merge_inputs):
        if merge_input.statistics is None:
            raise RecipeError(
                f"merge: {step} needs statistics of every model, but model {number + 1} has none; give a file of them "
                "for each, or choose a step that needs none, e.g. mean"
            )
    for name in wanted:
        having = [name in require_statistics(merge_input) for merge_input in merge_inputs]
        if any(having) and not all(having):
            raise ModelError(
                f"merge: the statistics of model {having.index(False) + 1} lack {name}, which others have; "
                "measure all models alike"
            )
    if not any(name in require_statistics(merge_inputs[0]) for name in wanted):
        raise ModelError("merge: the statistics name no tensor of the models; measure these models")
