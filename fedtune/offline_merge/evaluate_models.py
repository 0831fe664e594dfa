"""Run the models of a merge: evaluate them on data, and collect activation statistics for steps that need them."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune import models, tasks
from fedtune.errors import ModelError, RecipeError
from fedtune.merging import AlignStep, MergeContext, RelaxStep, RenormaliseStep, measure_activation_statistics
from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.merge_config import MergeConfig, ModelEntry
from fedtune.offline_merge.readers.open_model import RunExporter, open_model
from fedtune.offline_merge.readers.safetensors_folder import SafetensorsModelReader
from fedtune.offline_merge.run_merge import PreparedMerge, prepare_merge
from fedtune.offline_merge.write_model import write_merged_model
from fedtune.recipe.schema import (
    ColumnSettings,
    DataSettings,
    DeviceClass,
    Federation,
    ModelSettings,
    Recipe,
    Train,
)
from fedtune.tasks import Task

if TYPE_CHECKING:
    from fedtune.training import Metric

__all__ = ["collect_merge_context", "evaluate_folder", "materialise_model"]

_BATCH = 32
_CPU = torch.device("cpu")


@contextmanager
def materialise_model(source: str, runs: RunExporter) -> Iterator[Path]:
    """Yield a folder of plain safetensors with the model. For another format, it is written for the block."""
    opened = open_model(source, runs)
    if isinstance(opened, SafetensorsModelReader):
        yield opened.folder
        return
    with tempfile.TemporaryDirectory(prefix="fedtune-merge-") as made:
        folder = Path(made) / "model"
        alone = MergeConfig(merge_method="passthrough", models=[ModelEntry(model=source)], dtype="float32")
        write_merged_model(prepare_merge(alone, runs), folder, "")
        yield folder


def evaluate_folder(
    folder: Path,
    task: Task,
    source: str,
    columns: Mapping[str, str],
    split: str = "all",
    device: torch.device = _CPU,
) -> "list[Metric]":
    """Evaluate a model on a split of a data source."""
    from fedtune.training import EvaluatedModel, evaluate_model

    recipe = _recipe(folder, task, DataSettings(source=source, columns=ColumnSettings.model_validate(columns)))
    labels = _labels(folder, task)
    examples = tasks.load_all_examples(recipe, labels, split)
    encoded = task.encode_examples(examples, recipe, task.load_reader(recipe))
    model = models.load_model(recipe.model, task, labels, seed=0).to(device)
    return evaluate_model(EvaluatedModel(model, task, _BATCH), encoded)


def collect_merge_context(
    prepared: PreparedMerge,
    task: Task | None,
    source: str | None,
    column: str | None,
    runs: RunExporter,
    device: torch.device = _CPU,
) -> MergeContext:
    """Collect what the steps need, on the base, or on the first model if there is no base.

    Raises RecipeError if the task or the calibration data is missing.
    """
    needs = prepared.steps.needs
    if not needs:
        return MergeContext()
    if task is None:
        raise RecipeError(f"{_who(prepared)} must run the model; say what it does with --task")
    if source is None and needs & {"activity", "batches"}:
        raise RecipeError(f"{_who(prepared)} must watch the model at work; name data with --calibration-data")
    from fedtune.training.calibration_inputs import load_calibration_inputs

    with materialise_model(prepared.models.base or next(iter(prepared.models.by_name)), runs) as folder:
        model = ModelSettings(source=f"path:{folder}")
        net = models.load_model(model, task, _labels(folder, task), seed=0).to(device).eval()
        if prepared.steps.renormalise:
            _check_shapes(prepared, net.state_dict())
        batches = [] if source is None else load_calibration_inputs(source, model, task, column=column)
    found = measure_activation_statistics(net, batches) if "activity" in needs else {}
    known = {target.base_tensor for target in prepared.output_tensors if target.base_tensor} or {
        target.name for target in prepared.output_tensors
    }
    if "activity" in needs and not found.keys() & known:
        raise ModelError(f"{_who(prepared)} finds no weight of the result in the model; name another base or task")
    return MergeContext(
        activation_statistics=found, model=net if "model" in needs else None, calibration_batches=batches
    )


def _check_shapes(prepared: PreparedMerge, state: Mapping[str, Tensor]) -> None:
    """Raise ModelError if the result has other shapes than the model on which activations are measured."""
    step = prepared.steps.renormalise[0].name
    for target in prepared.output_tensors:
        if target.name in state and tuple(state[target.name].shape) != target.form.shape:
            raise ModelError(
                f"{step} watches the result in the net it was given, where {target.name} is "
                f"{list(state[target.name].shape)}, not {list(target.form.shape)}; leave {step} out"
            )


def _who(prepared: PreparedMerge) -> str:
    chosen = prepared.steps
    steps: tuple[AlignStep | RelaxStep | RenormaliseStep, ...] = (*chosen.align, *chosen.relax, *chosen.renormalise)
    return next(step.name for step in steps if step.needs)


def _labels(folder: Path, task: Task) -> tuple[str, ...]:
    """Return the class names in order. A head without names gets numbers."""
    if not task.has_new_head:
        return ()
    named = read_json(folder / "config.json").get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _recipe(folder: Path, task: Task, source: DataSettings) -> Recipe:
    """Return a minimal recipe that reads the data for the model."""
    return Recipe(
        name="merge",
        task=task.name,
        model=ModelSettings(source=f"path:{folder}"),
        data=source,
        devices=[DeviceClass(count=1)],
        train=Train(local_steps=1),
        federation=Federation(rounds=1),
    )
