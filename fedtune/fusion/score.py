"""Models of a merge at work: scored on data, and watched on calibration data for steps that need it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fedtune import data, models
from fedtune.errors import ModelError, RecipeError
from fedtune.fusion.config import Entry, MergeConfig
from fedtune.fusion.folder import Folder
from fedtune.fusion.fuse import Merge, prepare
from fedtune.fusion.json_file import read_json
from fedtune.fusion.result import merge
from fedtune.fusion.sources import Exporter, open_source
from fedtune.merging import Align, Evidence, Relax, Renormalise
from fedtune.recipe import Columns, Data, DeviceClass, Federation, Model, Recipe, Task, Train

if TYPE_CHECKING:
    from fedtune.training import Score

__all__ = ["gather", "score_folder", "whole_folder"]

_BATCH = 32


@contextmanager
def whole_folder(source: str, runs: Exporter) -> Iterator[Path]:
    """A folder of plain safetensors with a model in it; one that is stored otherwise is written for the block."""
    opened = open_source(source, runs)
    if isinstance(opened, Folder):
        yield opened.folder
        return
    with tempfile.TemporaryDirectory(prefix="fedtune-merge-") as made:
        folder = Path(made) / "model"
        alone = MergeConfig(merge_method="passthrough", models=[Entry(model=source)], dtype="float32")
        merge(prepare(alone, runs), folder, "")
        yield folder


def score_folder(folder: Path, task: Task, source: str, columns: Mapping[str, str], part: str = "all") -> "list[Score]":
    """Figures of a model on all examples of a data source."""
    from fedtune.training import score

    recipe = _recipe(folder, task, Data(source=source, columns=Columns.model_validate(columns)))
    labels = _labels(folder, task)
    examples = data.everything(recipe, labels, part)
    model = models.load(recipe.model, task, labels, seed=0)
    return score(model, data.encode(examples, recipe, models.reader(recipe)), _BATCH, task)


def gather(prepared: Merge, task: Task | None, source: str | None, column: str | None, runs: Exporter) -> Evidence:
    """What the steps need to know, measured on the base, or on the first model where no base is named.

    RecipeError when it cannot be measured for want of a task or of calibration data.
    """
    needs = prepared.steps.needs
    if not needs:
        return Evidence()
    if task is None:
        raise RecipeError(f"{_who(prepared)} must run the model; say what it does with --task")
    if source is None and needs & {"activity", "batches"}:
        raise RecipeError(f"{_who(prepared)} must watch the model at work; name data with --calibrate")
    from fedtune.training.activity import activity
    from fedtune.training.calibration import calibration

    with whole_folder(prepared.models.base or next(iter(prepared.models.by_name)), runs) as folder:
        model = Model(source=f"path:{folder}")
        net = models.load(model, task, _labels(folder, task), seed=0).eval()
        if prepared.steps.renormalise:
            _check_shapes(prepared, net.state_dict())
        batches = [] if source is None else calibration(source, model, task, column=column)
    found = activity(net, batches) if "activity" in needs else {}
    known = {target.base for target in prepared.targets if target.base} or {target.name for target in prepared.targets}
    if "activity" in needs and not found.keys() & known:
        raise ModelError(f"{_who(prepared)} finds no weight of the result in the model; name another base or task")
    return Evidence(activity=found, model=net if "model" in needs else None, batches=batches)


def _check_shapes(prepared: Merge, state: Mapping[str, Tensor]) -> None:
    """ModelError when the result is no state of the net that its activations are to be watched in."""
    step = prepared.steps.renormalise[0].name
    for target in prepared.targets:
        if target.name in state and tuple(state[target.name].shape) != target.form.shape:
            raise ModelError(
                f"{step} watches the result in the net it was given, where {target.name} is "
                f"{list(state[target.name].shape)}, not {list(target.form.shape)}; leave {step} out"
            )


def _who(prepared: Merge) -> str:
    chosen = prepared.steps
    steps: tuple[Align | Relax | Renormalise, ...] = (*chosen.align, *chosen.relax, *chosen.renormalise)
    return next(step.name for step in steps if step.needs)


def _labels(folder: Path, task: Task) -> tuple[str, ...]:
    """Class names in order; those of a head that has none are numbers."""
    if task == "causal-language-modelling":
        return ()
    named = read_json(folder / "config.json").get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _recipe(folder: Path, task: Task, source: Data) -> Recipe:
    """The least recipe that reads the data for the model."""
    return Recipe(
        name="merge",
        task=task,
        model=Model(source=f"path:{folder}"),
        data=source,
        devices=[DeviceClass(count=1)],
        train=Train(steps=1),
        federation=Federation(rounds=1),
    )
