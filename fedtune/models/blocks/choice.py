"""Finds the model of plain blocks for a recipe, or says why transformers builds it after all."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedtune.errors import FedtuneWarning, SourceError
from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.blocks.configuration import UnknownBlocksError
from fedtune.models.blocks.load import build_block_skeleton, load_block_model
from fedtune.models.blocks.shape_only import build_shapes_only
from fedtune.models.model_task import ModelTask
from fedtune.models.paging.gguf_description import list_described_tensors
from fedtune.models.paging.source_tensors import SourceTensor, list_safetensors
from fedtune.models.sources import find_gguf_file
from fedtune.recipe.schema import ModelSettings

__all__ = ["PROVEN_VERSIONS", "explain_blocks_misfit", "find_block_model", "list_file_tensors", "make_block_skeleton"]

PROVEN_VERSIONS = ("5.23.", "5.24.")
"""Versions of transformers whose bits the blocks have. Tests compare them with the installed one."""


def find_block_model(
    model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str], *, seed: int, problem: str | None
) -> BlockModel | None:
    """Load a model of plain blocks; None, after a warning with the reason, if transformers must do it.

    ``problem`` is a reason that is known before.
    """
    try:
        _require_known_ground(model, location, problem)
        folder = Path(location)
        return load_block_model(model, folder, list_file_tensors(model, folder), task, labels, seed)
    except UnknownBlocksError as error:
        warnings.warn(
            f"{model.source} is built by transformers, whose imports take about 200 MB, because {error}",
            FedtuneWarning,
            stacklevel=2,
        )
        return None


def make_block_skeleton(
    model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str], *, problem: str | None
) -> BlockModel:
    """Build the model that ``find_block_model`` loads, with drawn weights; UnknownBlocksError where it finds none.

    The configuration decides, and the names and shapes in the heads of the files if they can be read.
    """
    _require_known_ground(model, location, problem)
    tensors: Mapping[str, SourceTensor] | None = None
    with suppress(SourceError, OSError, ValueError):  # files that are damaged, or there later
        tensors = list_file_tensors(model, Path(location))
    return build_block_skeleton(model, Path(location), tensors, task, labels)


def explain_blocks_misfit(
    model: ModelSettings, location: str, task: ModelTask, labels: Sequence[str], *, problem: str | None
) -> str | None:
    """Return why a process that prefers plain blocks does not build a model of them; None if it does."""
    try:
        with build_shapes_only():
            make_block_skeleton(model, location, task, labels, problem=problem)
    except UnknownBlocksError as error:
        return str(error)
    return None


def _require_known_ground(model: ModelSettings, location: str, problem: str | None) -> None:
    """Raise UnknownBlocksError where the source, the machine or the version of transformers is not a proven one.

    ``problem`` is a reason that is known before.
    """
    if problem is not None:
        raise UnknownBlocksError(problem)
    if not Path(location).is_dir():
        raise UnknownBlocksError("it is fetched from the hub; fetch it once and name its folder: path:FOLDER")
    if (Path(location) / "adapter_config.json").exists():
        raise UnknownBlocksError("its folder has an adapter")
    if model.position_interpolation != 1:
        raise UnknownBlocksError("its positions are interpolated")
    if torch.backends.mps.is_available() or torch.xpu.is_available() or os.environ.get("TRANSFORMERS_SDPA_FORCE_GQA"):
        raise UnknownBlocksError("attention is computed otherwise on this machine")
    if (installed := _find_version()) is not None and not installed.startswith(PROVEN_VERSIONS):
        raise UnknownBlocksError(f"transformers is {installed}, and only {PROVEN_VERSIONS[-1]}x is proven equal")


def _find_version() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def list_file_tensors(model: ModelSettings, folder: Path) -> Mapping[str, SourceTensor]:
    """Return the tensors of the model's files; UnknownBlocksError if they have other names than usual."""
    if model.paged and (file := find_gguf_file(model.source)) is not None:
        return list_described_tensors(folder, file)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return list_safetensors([single])
    if not index.is_file():
        raise UnknownBlocksError(f"its folder has no {single.name}")
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    return list_safetensors([folder / name for name in names])
