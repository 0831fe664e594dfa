"""Resolves a recipe: checks its techniques and merge steps, and writes out all their settings."""

from collections.abc import Sequence

from fedtune import algorithms, data, merging, tasks, techniques
from fedtune.attacks import check_attacks, write_out_attack
from fedtune.errors import RecipeError
from fedtune.recipe.memory_plans import MemoryPlans
from fedtune.recipe.schema import DeviceClass, EvaluationSettings, Recipe, TaskUnit, Train, Unit, WireSettings
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.techniques import Technique
from fedtune.training.backward_updates import check_backward_updates
from fedtune.training.carried_state_checks import check_server_optimiser
from fedtune.training.kept_tensors import find_keeping_unit
from fedtune.training.metrics import check_metrics
from fedtune.training.model_checks import check_privacy_settings
from fedtune.training.model_counts import check_model_counts
from fedtune.training.root_data_checks import check_root_data
from fedtune.training.stream_tasks import check_stream_settings, follow_stream, list_stream_tasks
from fedtune.training.wire_checks import check_wire
from fedtune.training.zeroth_order_checks import check_zeroth_order
from fedtune.wire.client_update import UpdateKind
from fedtune.wire.codecs import build_wire_pipeline

__all__ = ["resolve_recipe"]

_MEND: dict[UpdateKind, str] = {
    "tensors": "merge by fedit, flexlora or hetlora, by fedex-lora or flora with trained_factors: both-and-base, or "
    "train one factor",
    "pairs": "set lora: {trained_factors: both}, or merge by mean",
    "pairs and base": "set lora: {trained_factors: both-and-base}, or merge by mean",
}


def resolve_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe as it is stored with a run; RecipeError for invalid techniques or merge steps."""
    task = tasks.get_task(recipe.task).read_files()
    if recipe.train.augmentation is not None and not task.can_augment:
        raise RecipeError(f"train.augmentation: {task.name} has no images to change; drop augmentation")
    chosen = techniques.build_techniques(recipe.train.techniques)
    pipeline = merging.build_pipeline(recipe.merge)
    _check_fit(chosen, pipeline.combine)
    every, algorithm = [*chosen, *_of_classes(recipe.devices)], algorithms.find_algorithm(recipe)
    if algorithm is not None:
        algorithms.check_algorithm(algorithm, recipe, every, pipeline)
    _check_own(find_keeping_unit(recipe, chosen), pipeline, recipe.evaluation)
    check_privacy_settings(recipe, pipeline)
    check_server_optimiser(every, pipeline)
    check_backward_updates(recipe, every)
    check_zeroth_order(recipe, every, pipeline, algorithm)
    check_wire(recipe, every, pipeline, algorithm)
    check_model_counts(recipe, pipeline)
    check_root_data(recipe, pipeline.combine)
    check_metrics(recipe)
    check_attacks(recipe)
    _check_early_stopping(recipe, find_keeping_unit(recipe, chosen), task)
    data.check_partition(recipe)
    check_stream_settings(recipe)
    _check_copies(recipe)
    recipe = list_stream_tasks(recipe)
    train = recipe.train.fill_in_packing().model_copy(
        update={"techniques": _written_out(follow_stream(recipe, chosen))}
    )
    devices = [write_out_attack(_resolved(recipe, device, chosen, pipeline)) for device in recipe.devices]
    if recipe.federation.asynchronous is not None:
        _check_late(every, pipeline, recipe.evaluation)
    merge = _written_out(pipeline.steps)
    written = TaskUnit(name=task.name, settings=task.model_dump(mode="json"))
    changes = {"task": written, "train": train, "devices": devices, "merge": merge}
    if algorithm is not None:
        changes["federation"] = recipe.federation.model_copy(update={"algorithm": _written_out([algorithm])[0]})
    if recipe.wire is not None:
        changes["wire"] = _write_out_wire(recipe.wire)
    changes |= {
        "plans": _resolve_plans(recipe, train, devices),
        "evaluation": _resolve_evaluation(recipe.evaluation, task),
    }
    return recipe.model_copy(update=changes)


def _resolve_plans(recipe: Recipe, train: Train, devices: Sequence[DeviceClass]) -> MemoryPlans | None:
    """Return the plans with their techniques written out like those of the recipe, so that they can be compared.

    RecipeError if the recipe has other techniques: real devices would then train other tensors than the server expects.
    """
    if recipe.plans is None:
        return None
    written = [
        _written_out(follow_stream(recipe, techniques.build_techniques(option.techniques, "plans")))
        for option in recipe.plans.options
    ]
    own = {"train.techniques": train.techniques} | {
        f"devices: {one.name}": one.techniques for one in devices if one.techniques
    }
    if strange := [where for where, units in own.items() if units not in written]:
        raise RecipeError(
            f"{strange[0]} are techniques of no plan, and real devices train as planned; remove plans from the recipe, "
            "or set train.techniques to auto to plan anew"
        )
    options = [
        option.model_copy(update={"techniques": units})
        for option, units in zip(recipe.plans.options, written, strict=True)
    ]
    return recipe.plans.model_copy(update={"options": options})


def _write_out_wire(wire: WireSettings) -> WireSettings:
    up, down = (
        _written_out(build_wire_pipeline(units, f"wire.{key}").units)
        for key, units in (("up", wire.up), ("down", wire.down))
    )
    return wire.model_copy(update={"up": up, "down": down})


def _check_copies(recipe: Recipe) -> None:
    """Raise RecipeError if clients would hold out examples of which they train on copies."""
    heavy = [source.source for source in recipe.data.sources or [] if source.weight > 1]
    if heavy and recipe.evaluation.local_holdout:
        raise RecipeError(
            f"data.sources: the weight of {heavy[0]} repeats examples, and evaluation.local_holdout would hold out "
            "copies of what a client trains on; set weights of at most 1, or leave local_holdout out"
        )


def _resolve_evaluation(evaluation: EvaluationSettings, task: tasks.Task) -> EvaluationSettings:
    """Fill in the main metric; RecipeError when the task does not have the named one."""
    if evaluation.main_metric is None:
        return evaluation.model_copy(update={"main_metric": task.main_metric})
    known = [*task.compute_metrics(tasks.ScoreSums()), *evaluation.metrics]
    if evaluation.main_metric not in known:
        hint = suggest_nearest(evaluation.main_metric, known)
        raise RecipeError(f"evaluation.main_metric: {task.name} has no {evaluation.main_metric!r}; {hint}")
    return evaluation


def _resolved(
    recipe: Recipe, device: DeviceClass, chosen: Sequence[Technique], pipeline: merging.MergePipeline
) -> DeviceClass:
    """Return a device class with its techniques written out.

    They must send the same kind of update as the common ones.
    """
    if device.techniques is None:
        return device
    own = techniques.build_techniques(device.techniques, f"devices: {device.name}")
    _check_fit(own, pipeline.combine)
    for technique in (*chosen, *own):
        if technique.has_local_tensors() or technique.has_weight_masks():
            raise RecipeError(
                f"devices: {technique.name} needs all devices to train alike, but {device.name} has techniques of its "
                "own; drop them or the technique"
            )
    return device.model_copy(update={"techniques": _written_out(follow_stream(recipe, own))})


def _of_classes(devices: Sequence[DeviceClass]) -> list[Technique]:
    chosen = [techniques.build_techniques(one.techniques, f"devices: {one.name}") for one in devices if one.techniques]
    return [technique for own in chosen for technique in own]


def _check_fit(chosen: Sequence[Technique], combine: merging.CombineStep) -> None:
    """Raise RecipeError unless the merge accepts what clients send: tensors, one factor or both factors of low-rank
    pairs.
    """
    sending = [one for one in chosen if one.get_update_kind() != "tensors"]
    sent = {} if any(one.replaces_update for one in chosen) else {one.get_update_kind(): one.name for one in sending}
    if combine.update_kind == "tensors" and sent.keys() == {"one factor"}:
        _check_factor(sent["one factor"], combine)
    elif combine.update_kind not in (sent or {"tensors": ""}):
        trained = " and ".join(f"{name} sends {kind}" for kind, name in sent.items()) or "clients send tensors"
        raise RecipeError(
            f"merge: {combine.name} takes {combine.update_kind}, but {trained}; {_MEND[combine.update_kind]}"
        )


def _check_factor(name: str, combine: merging.CombineStep) -> None:
    """Raise RecipeError for a merge that selects entries or directions: those of a factor are not the product's."""
    if combine.selects_entries:
        raise RecipeError(
            f"merge: {combine.name} depends on how a product is factored, but {name} sends one factor of it, so that "
            "equal updates would merge differently; merge by mean, task-arithmetic or dare-linear, or train full"
        )


def _check_own(keeping: str | None, pipeline: merging.MergePipeline, evaluation: EvaluationSettings) -> None:
    """Check recipes whose devices keep local tensors, so that the server has no complete model.

    The server then cannot evaluate, align or measure a model. Raises RecipeError when the recipe requires it.
    """
    if keeping is None:
        return
    if not evaluation.local_holdout:
        raise RecipeError(
            f"evaluation.local_holdout: {keeping} leaves the server no whole model to score, so clients must hold "
            "examples out; set a share, e.g. 0.2"
        )
    if evaluation.prompts:
        raise RecipeError(
            f"evaluation.prompts: {keeping} leaves the server no whole model to generate text with; drop the prompts"
        )
    unfit = [step.name for step in pipeline.steps if step.needs or step in (*pipeline.align, *pipeline.renormalise)]
    unfit += [pipeline.combine.name] if pipeline.combine.reference == "root data" else []
    if unfit:
        raise RecipeError(
            f"merge: {unfit[0]} needs a whole model, but {keeping} keeps some tensors on devices; drop one"
        )


def _check_early_stopping(recipe: Recipe, keeping: str | None, task: tasks.Task) -> None:
    """Raise RecipeError if nobody measures the metric that ends the run."""
    metric = recipe.evaluation.main_metric or task.main_metric
    if recipe.federation.early_stopping is not None and keeping is not None and metric not in ("accuracy", "loss"):
        raise RecipeError(
            f"federation.early_stopping: {keeping} leaves the server no whole model to score, and clients report "
            f"accuracy and loss, but the main metric is {metric}; set evaluation.main_metric: loss"
        )


def _check_late(chosen: Sequence[Technique], pipeline: merging.MergePipeline, evaluation: EvaluationSettings) -> None:
    """Raise RecipeError for steps that need models of one round. A late update is a delta to an older state."""
    moving = next((technique.name for technique in chosen if technique.changes_per_round()), None)
    if moving is not None:
        mend = "; set trained_factors: b-only" if moving in ("lora", "qlora") else "; drop one"
        raise RecipeError(
            f"federation.asynchronous: {moving} trains other tensors each round, which stale updates lack{mend}"
        )
    if evaluation.local_holdout:
        raise RecipeError(
            "federation.asynchronous: clients score the model they begin with, which is not the same for all, so "
            "evaluation.local_holdout tells nothing of a round; drop one, and with it what leaves the server "
            "no whole model"
        )
    request = merging.build_calibration_request(pipeline.steps)
    measured = (
        [step.name for step in pipeline.steps if step.needs]
        if request is not None and request.calibrate_on == "clients"
        else []
    )
    whole = [step.name for step in (*pipeline.align, *pipeline.renormalise)]
    pairs = [] if pipeline.combine.update_kind == "tensors" else [pipeline.combine.name]
    if unfit := [*whole, *pairs, *measured]:
        raise RecipeError(
            f"federation.asynchronous: {unfit[0]} wants the models of one round, but late answers are deltas to "
            "older ones; drop one, or merge by e.g. mean"
        )


def _written_out(units: Sequence[NamedUnit]) -> list[Unit]:
    return [Unit(name=unit.name, settings=unit.model_dump(mode="json")) for unit in units]
