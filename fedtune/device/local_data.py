"""The model and the local examples of a device. They are loaded once per recipe and stay in memory."""

import json
import sys
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedtune import data, tasks, techniques
from fedtune.data.label_encoders import find_label_column
from fedtune.data.packed_texts import count_tokens
from fedtune.errors import DataError
from fedtune.plan.device_plans import apply_device_plan
from fedtune.recipe.refused_attacks import refuse_attacks
from fedtune.recipe.required_plug_ins import decode_plug_ins, require_plug_ins
from fedtune.recipe.schema import ColumnSettings, DataSettings, Recipe
from fedtune.training import RunContext, clear_run_context, get_run_context, prepare_model
from fedtune.training.metrics import load_metrics
from fedtune.wire.client_update import FEWEST, TrainRequest

__all__ = ["LocalData", "summarise_local_data"]

Rows = NDArray[np.int64]


class LocalData:
    """Examples of ``source``: csv:, jsonl:, parquet:, folder: or sample:, or partition:I of the recipe's data.

    ``budget`` is the device's memory in bytes, by which it takes one of the plans of a run that has some.
    """

    def __init__(self, source: str, budget: int = sys.maxsize) -> None:
        self._source, self._budget = source, budget
        self._key: tuple[str, str] | None = None
        self._held: tuple[RunContext, Rows] | None = None

    def get_context(self, request: TrainRequest) -> tuple[RunContext, Rows]:
        """Return the run context for a train request, and this device's rows of its train split.

        Raise MemoryBudgetError if no plan of the run fits the device.
        """
        require_plug_ins(decode_plug_ins(request.plug_ins))
        sent = Recipe.model_validate_json(request.recipe)
        refuse_attacks(sent)
        recipe = apply_device_plan(sent, request.client, self._budget)
        key = (recipe.model_dump_json(), request.label_names)
        labels = tuple(json.loads(request.label_names))
        if self._held is None or self._key != key:
            self._held = None  # frees the last model before the next one is loaded
            clear_run_context()
            techniques.build_techniques(recipe.train.techniques)  # one that cannot be imported is refused first
            if recipe.evaluation.local_holdout:
                load_metrics(recipe)  # before the model: raises errors early, and counts in the memory in use
            if self._source.startswith("partition:"):
                self._held = _part(recipe, labels, self._source)
            else:
                self._held = _own(recipe, labels, self._source)
            self._key = key
        return self._held


def summarise_local_data(context: RunContext, rows: Rows) -> dict[str, int | dict[str, int]]:
    """Return the counts that a device reports to the operator: all examples, and the examples of each class.

    If targets weigh a client, its tokens are counted too, which bound its targets.

    Classes with fewer than :data:`fedtune.wire.client_update.FEWEST` examples are left out, because small counts reveal
    single examples. The result is empty if the clients add noise, because such a device does not trust the server.
    """
    if context.recipe.privacy is not None and context.recipe.privacy.noise_added_by == "clients":
        return {}
    counted: dict[str, int | dict[str, int]] = {"examples": len(rows), "labels": _count_classes(context, rows)}
    if context.recipe.train.weigh_by == "tokens":
        counted["tokens"] = count_tokens(context.train, rows)
    return counted


def _count_classes(context: RunContext, rows: Rows) -> dict[str, int]:
    """Count the examples that have each class. One that has several, such as words with tags, counts once for each."""
    column = find_label_column(context.task.columns)
    if column is None:
        return {}
    counted: Mapping[int, int] = Counter(
        number
        for value in context.corpus.train.select(rows)[column]
        for number in (set(value) if isinstance(value, list) else (value,))
    )
    names = enumerate(context.corpus.label_names)
    return {name: counted[number] for number, name in names if counted[number] >= FEWEST}


def _part(recipe: Recipe, labels: tuple[str, ...], source: str) -> tuple[RunContext, Rows]:
    settings = recipe.data
    if settings.train is not None and settings.validation is not None and settings.test is not None:
        context = _load_train_source(recipe, labels)
    else:
        context = get_run_context(recipe.model_dump_json())
    number = source.removeprefix("partition:")
    if not number.isdecimal() or int(number) >= len(context.client_rows):
        raise DataError(
            f"--data {source} is none of the recipe's {len(context.client_rows)} partitions; count from partition:0"
        )
    return context, context.client_rows[int(number)]


def _load_train_source(recipe: Recipe, labels: tuple[str, ...]) -> RunContext:
    """Return a run context without the held-out examples, whose files a device need not have."""
    held_out = {"source": recipe.data.train, "train": None, "validation": None, "test": None}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=held_out)})
    return _build_context(recipe, labels, data.limit_examples(recipe, tasks.load_trainable_examples(recipe, labels)))


def _own(recipe: Recipe, labels: tuple[str, ...], source: str) -> tuple[RunContext, Rows]:
    """Return a run context whose train split has all examples of the source.

    Columns are named as in the recipe, and its filter and map are applied.
    """
    domain = recipe.data.columns.domain if recipe.stream is not None and recipe.stream.by == "domain" else None
    columns = recipe.data.columns.model_dump(exclude={"group"}) | {"domain": domain}
    chosen = DataSettings(
        source=source,
        columns=ColumnSettings.model_validate(columns),
        skip_unreadable=recipe.data.skip_unreadable,
        filter=recipe.data.filter,
        map=recipe.data.map,
        tokens=recipe.data.tokens if source.startswith(("jsonl:", "parquet:")) else "memory",
    )
    recipe = recipe.model_copy(update={"data": chosen})
    examples = tasks.load_trainable_examples(recipe, labels)
    return _build_context(recipe, labels, examples), np.arange(len(examples))


def _build_context(recipe: Recipe, labels: tuple[str, ...], examples: data.Table) -> RunContext:
    nothing = examples.select([])
    corpus = data.DataSplits(examples, nothing, nothing, labels)
    return RunContext(recipe, corpus, *prepare_model(recipe, labels))
