"""``techniques: auto``: each device class gets the plan that its memory allows, and all of them can be merged."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedtune.errors import RecipeError
from fedtune.plan.plan_report import trace_settings
from fedtune.plan.plans import Plan, choose_plan, correct_plan, describe_plan, list_plans
from fedtune.plan.runtimes import measure_runtimes
from fedtune.plan.settings_trace import SettingsTrace
from fedtune.recipe.memory_plans import MemoryPlans, PlanOption
from fedtune.recipe.schema import Recipe, Unit

__all__ = ["CompatiblePlans", "choose_compatible_plans", "has_auto_techniques", "plan_auto_techniques"]

_AUTO = "auto"
_STAND_IN = [Unit(name="lora")]
"""What a recipe has while its plans are made."""


def has_auto_techniques(recipe: Recipe) -> bool:
    """Return whether the recipe leaves the choice of techniques to a plan, for all devices or for a class."""
    return any(_is_auto(units) for units in _list_all(recipe))


def _list_all(recipe: Recipe) -> list[Sequence[Unit] | None]:
    return [recipe.train.techniques, *(device.techniques for device in recipe.devices)]


def _is_auto(units: Sequence[Unit] | None) -> bool:
    return units is not None and any(unit.name == _AUTO for unit in units)


def plan_auto_techniques(
    recipe: Recipe, modules: Sequence[str], corrections: Mapping[str, float] = {}
) -> tuple[Recipe, dict[str, Plan]]:
    """Return the recipe with the techniques of each class's plan, and the plans by class.

    ``modules`` are what a trainer imports. ``corrections`` are factors on predicted memory by class. The recipe keeps
    all plans that can be merged with them, from which real devices take those of their own budget.

    RecipeError if ``auto`` stands beside other techniques, if a class without it has techniques of its own, or if no
    plans that can be merged fit all classes.
    """
    _check_settings(recipe)
    train = recipe.train.model_copy(update={"techniques": _STAND_IN})
    plain = [device.model_copy(update={"techniques": None}) for device in recipe.devices]
    traces = trace_settings(recipe.model_copy(update={"train": train, "devices": plain}), None)
    working = [trace for trace in traces if trace.error is None]
    runtimes = measure_runtimes(sorted({trace.runtime for trace in working}), modules)
    own = {device.name: corrections[device.name] for device in recipe.devices if device.name in corrections}
    budgets = {device.name: int(device.memory) for device in recipe.devices}
    chosen = choose_compatible_plans(list_plans(working, runtimes, recipe.train), working, budgets, own)
    return _apply(recipe, chosen, own), chosen.by_class


def _check_settings(recipe: Recipe) -> None:
    for units in filter(_is_auto, _list_all(recipe)):
        if units is not None and len(units) > 1:
            raise RecipeError("train.techniques: auto chooses all techniques; remove the others beside it")
    own = [
        device.name for device in recipe.devices if device.techniques is not None and not _is_auto(device.techniques)
    ]
    if own or not _is_auto(recipe.train.techniques):
        where = f"devices: {own[0]} has techniques of its own" if own else "train.techniques is not auto"
        raise RecipeError(f"{where}, but others are auto; set train.techniques to auto and leave those of devices out")


class CompatiblePlans(NamedTuple):
    """A plan for each device class by name, and all plans that train tensors of the same names and shapes."""

    by_class: dict[str, Plan]
    options: list[Plan]


def choose_compatible_plans(
    plans: Sequence[Plan],
    traces: Sequence[SettingsTrace],
    budgets: Mapping[str, int],
    corrections: Mapping[str, float] = {},
) -> CompatiblePlans:
    """Return a plan for each device class by name. All of them train tensors of the same names and shapes.

    Among the sets of plans that can be merged, one with exact gradients everywhere is taken before others, then the one
    whose slowest class is fastest. RecipeError if none fits all classes.
    """
    sets = [
        CompatiblePlans(_choose_for_all(group, budgets, corrections), group)
        for group in _group_by_shapes(plans, traces)
    ]
    fitting = [chosen for chosen in sets if len(chosen.by_class) == len(budgets)]
    if not fitting:
        raise RecipeError(_explain_misfit(plans, budgets, corrections))
    return min(fitting, key=lambda chosen: _rank_set(chosen.by_class))


def _rank_set(plans: Mapping[str, Plan]) -> tuple[Any, ...]:
    found = plans.values()
    rough = any(not plan.exact_gradients or plan.dtype != "float32" for plan in found)
    return rough, max(plan.relative_time for plan in found), max(plan.bytes_per_round for plan in found)


def _group_by_shapes(plans: Iterable[Plan], traces: Iterable[SettingsTrace]) -> list[list[Plan]]:
    """Return the plans in groups that train tensors of the same names and shapes."""
    shapes = {trace.name: repr(sorted(trace.shapes.items())) for trace in traces}
    groups: dict[str, list[Plan]] = defaultdict(list)
    for plan in plans:
        groups[shapes[plan.name]].append(plan)
    return list(groups.values())


def _choose_for_all(
    plans: Sequence[Plan], budgets: Mapping[str, int], corrections: Mapping[str, float]
) -> dict[str, Plan]:
    chosen = {name: _choose_corrected(plans, budget, corrections.get(name, 1.0)) for name, budget in budgets.items()}
    return {name: plan for name, plan in chosen.items() if plan is not None}


def _choose_corrected(plans: Sequence[Plan], budget: int, factor: float) -> Plan | None:
    """Return the best plan that fits if processes hold ``factor`` times the predicted memory."""
    corrected = [correct_plan(plan, factor) for plan in plans]
    best = choose_plan(corrected, budget, 1.0)
    return None if best is None else plans[corrected.index(best)]


def _explain_misfit(plans: Sequence[Plan], budgets: Mapping[str, int], corrections: Mapping[str, float]) -> str:
    if not plans:
        return "train.techniques: auto finds no technique that can be planned for this model; name the techniques"
    name = min(budgets, key=lambda one: budgets[one] / corrections.get(one, 1.0))
    factor = corrections.get(name, 1.0)
    smallest = min((correct_plan(plan, factor) for plan in plans), key=lambda plan: plan.needed_bytes)
    learned = "" if factor == 1 else f", {factor - 1:.0%} more than predicted as in its earlier runs"
    return (
        f"devices: no plan fits {name} with {budgets[name] / 1e6:.0f} MB; {describe_plan(smallest)} needs "
        f"{smallest.needed_bytes / 1e6:.0f} MB, the least of all{learned}; raise its memory, or lower train.max_length"
    )


def _make_option(plan: Plan) -> PlanOption:
    memory = {name: getattr(plan, name) for name in ("anonymous_bytes", "total_bytes", "needed_bytes")}
    return PlanOption(
        techniques=plan.techniques,
        micro_batch=plan.micro_batch,
        relative_time=plan.relative_time,
        exact_gradients=plan.exact_gradients,
        **memory,
    )


def _apply(recipe: Recipe, chosen: CompatiblePlans, corrections: Mapping[str, float]) -> Recipe:
    """Write the plan of the class with most memory into ``train``, the others' where they differ, and all plans."""
    largest = max(recipe.devices, key=lambda device: int(device.memory)).name
    common = chosen.by_class[largest]
    written = recipe.model_dump(mode="json")
    written["train"] |= {"techniques": common.techniques, "batch_size": common.micro_batch}
    for device in written["devices"]:
        plan = chosen.by_class[device["name"]]
        device["techniques"] = None if plan.techniques == common.techniques else plan.techniques
        device["batch_size"] = None if plan.micro_batch == common.micro_batch else plan.micro_batch
    plans = MemoryPlans(options=[_make_option(plan) for plan in chosen.options], corrections=dict(corrections))
    return Recipe.model_validate(written | {"plans": plans.model_dump(mode="json")})
