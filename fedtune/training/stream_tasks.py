"""Check the stream of a recipe against the rest of it, and turn a rule for its tasks into a list."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedtune import continual, tasks, techniques
from fedtune.data import DataSplits
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Natural, Recipe, Stream, Unit
from fedtune.recipe.stream_settings import EachValue, EqualGroups, StreamTask, TimeCuts
from fedtune.seeds import derive_seed

__all__ = ["check_stream_settings", "follow_stream", "list_stream_tasks", "list_times"]

_MOST_TASKS = 1000
_LEARNS_ONE_LABEL = frozenset({"analytic", "der", "replay"})
"""Methods that compare the examples of a task with all labels, whatever ``stream.loss`` says."""


def check_stream_settings(recipe: Recipe) -> None:
    """Raise RecipeError if a stream does not fit the task, the partition, the optimiser or the techniques."""
    stream = recipe.stream
    if stream is None:
        return
    task = tasks.get_task(recipe.task)
    if stream.by == "label" and not task.has_classes:
        raise RecipeError(
            f"stream.setting: {task.name} has no classes that could arrive; choose domain or time, or another task"
        )
    if stream.setting == "class" and recipe.train.weight_decay:
        raise RecipeError(
            "train.weight_decay: it moves the head's rows of classes that have not come yet; set it to 0 in a class "
            "stream"
        )
    if isinstance(recipe.data.partition, Natural) and recipe.data.partition.column == stream.by:
        raise RecipeError(
            f"data.partition: a client would have the examples of one {stream.by} alone and sit out all other tasks; "
            "use iid, dirichlet or power-law"
        )
    if recipe.federation.asynchronous is not None:
        raise RecipeError("federation.asynchronous: a late update belongs to an earlier task; drop it or the stream")
    _check_techniques(techniques.build_techniques(recipe.train.techniques), [unit.name for unit in stream.memory])
    continual.check_stream(recipe)


def _check_techniques(chosen: Sequence[techniques.Technique], memory: Sequence[str]) -> None:
    """Raise RecipeError if a technique lacks its memory, or if batch norms would follow the newest task."""
    for technique in chosen:
        if technique.needed_memory not in (None, *memory):
            raise RecipeError(
                f"train.techniques: {technique.name} needs what {technique.needed_memory} remembers of earlier tasks; "
                f"add it to stream.memory"
            )
        if technique.model_dump().get("norms") == "live":
            raise RecipeError(
                f"train.techniques: {technique.name} lets batch-norm statistics follow the newest task, which forgets "
                "the others; set norms: frozen"
            )


def list_stream_tasks(recipe: Recipe) -> Recipe:
    """Return the recipe with the tasks of its stream listed, and the rounds that they take.

    A rule such as ``{size: 2, rounds: 3}`` needs the labels or the values of the data, which are then loaded.
    """
    stream = recipe.stream
    if stream is None:
        return recipe
    listed = stream.tasks if isinstance(stream.tasks, list) else _list_tasks(recipe, stream)
    written = stream.model_copy(
        update={
            "tasks": listed,
            "memory": _write_out(recipe),
            "consolidate": continual.write_out_border_methods(stream.consolidate),
        }
    )
    _require_labels_to_compare(written)
    rounds = recipe.federation.model_copy(update={"rounds": written.num_rounds})
    return recipe.model_copy(update={"stream": written, "federation": rounds})


def _require_labels_to_compare(stream: Stream) -> None:
    """Raise RecipeError if the loss of a task would compare a single label with nothing, and thus be zero."""
    assert isinstance(stream.tasks, list)
    first = {task.name: task.where or [task.name] for task in reversed(stream.tasks)}
    alone = next((task.name for task in stream.tasks if len(first[task.name]) == 1), None)
    if alone is None or stream.blur or stream.setting not in ("class", "task"):
        return
    if stream.setting == "task":
        raise RecipeError(f"stream.tasks: {alone} has one label, so nothing is left to tell apart; give it two")
    if stream.loss == "new" and not {unit.name for unit in stream.memory} & _LEARNS_ONE_LABEL:
        raise RecipeError(
            f"stream.loss: new compares only the labels of a task, and {alone} has one, so its loss is zero; set "
            "loss: seen, or give each task two labels"
        )


def follow_stream(recipe: Recipe, chosen: Sequence[techniques.Technique]) -> list[techniques.Technique]:
    """Return the techniques with what they need to know of the recipe's stream, whose tasks must be listed."""
    if recipe.stream is None:
        return list(chosen)
    plan = continual.StreamPlan(recipe)
    visits = [(plan.find_task(number), visit.rounds) for number, visit in enumerate(plan.visits)]
    return [one.follow_stream(visits, together=recipe.stream.arrival == "together") for one in chosen]


def _write_out(recipe: Recipe) -> list[Unit]:
    assert recipe.stream is not None
    methods = continual.build_methods(recipe.stream.memory)
    return [Unit(name=method.name, settings=method.model_dump(mode="json")) for method in methods]


def _list_tasks(recipe: Recipe, stream: Stream) -> list[StreamTask]:
    rule = stream.tasks
    if isinstance(rule, TimeCuts):
        return list_times(rule)
    assert isinstance(rule, EqualGroups | EachValue)
    values = _find_values(recipe, tasks.load_data(recipe, tasks.load_class_names(recipe)))
    if rule.order == "seed":
        values = np.random.default_rng(derive_seed(recipe.seed, "stream")).permutation(values).tolist()
    if isinstance(rule, EachValue):
        return [StreamTask(name=value, rounds=rule.rounds) for value in values]
    groups = [values[start : start + rule.size] for start in range(0, len(values), rule.size)]
    return [StreamTask(name="+".join(group)[:255], where=group, rounds=rule.rounds) for group in groups]


def _find_values(recipe: Recipe, corpus: DataSplits) -> list[str]:
    """Return the values that tell tasks apart: the classes in the order of the head, or other values sorted."""
    assert recipe.stream is not None
    if recipe.stream.by == "label":
        return list(corpus.label_names)
    found = sorted(set(continual.read_stream_values(recipe, corpus.train, corpus.label_names)))
    if len(found) > _MOST_TASKS:
        raise RecipeError(f"stream.tasks: {recipe.stream.by} has {len(found)} values; list the tasks, or cut them")
    return found


def list_times(rule: TimeCuts) -> list[StreamTask]:
    """Return the tasks before, between and after the cuts."""
    bounds = [None, *rule.cut, None]
    return [
        StreamTask(name=f"{since or 'start'}..{until or 'end'}", since=since, until=until, rounds=rule.rounds)
        for since, until in pairwise(bounds)
    ]
