"""Run a method through a small matrix, as the author of a plug-in would want it before a release."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fedtune.data.partition_plug_in import assign_groups
from fedtune.errors import RecipeError
from fedtune.library.algorithm_check import check_algorithm_unit
from fedtune.library.attack_check import check_attack
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.library.codec_check import check_codec
from fedtune.library.continual_check import check_continual_method
from fedtune.library.merge_step_check import check_merge_step
from fedtune.library.method_list import UNIT_ROOMS, list_methods
from fedtune.library.run_callbacks import load_callbacks
from fedtune.library.task_check import check_task
from fedtune.library.technique_check import check_technique
from fedtune.recipe.plug_in_partition import PlugInPartition
from fedtune.recipe.plug_ins import find_plug_in
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, describe_unit_settings, read_unit_card
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.training.metrics import measure

__all__ = ["check_plug_in"]


def check_plug_in(name: str) -> Iterator[CheckResult]:
    """Check a method of any kind by its name; RecipeError for an unknown one."""
    known = list_methods()
    kind = next((kind for kind, one in known if one == name), None)
    if kind is None:
        raise RecipeError(f"there is no method {name!r}; {suggest_nearest(name, [one for _, one in known])}")
    if kind not in UNIT_ROOMS:
        yield run_check(*_SINGLE[kind](name))
        return
    built = run_check("builds with its default settings", lambda: _build(kind, name))
    yield built
    if built.status == "failed":
        return
    yield run_check("has a card and describes its settings", lambda: _check_card(kind, name))
    yield run_check("refuses an unknown setting", lambda: _check_unknown_setting(kind, name))
    yield run_check("its settings survive a recipe", lambda: _check_round_trip(kind, name))
    yield from _UNITS[kind](name)


def _build(kind: str, name: str, settings: Mapping[str, object] | None = None) -> object:
    return build_unit(UNIT_ROOMS[kind], Unit(name=name, settings=dict(settings or {})), kind)


def _check_card(kind: str, name: str) -> None:
    require(bool(read_unit_card(UNIT_ROOMS[kind], name).strip()), "its module has no docstring")
    lines = describe_unit_settings(UNIT_ROOMS[kind], name)
    required = [line.partition(":")[0] for line in lines if "PydanticUndefined" in line]
    require(not required, f"the setting {required[0] if required else ''} has no default")


def _check_unknown_setting(kind: str, name: str) -> None:
    try:
        _build(kind, name, {"no_such_setting": 1})
    except RecipeError:
        return
    require(False, "it takes the setting no_such_setting")


def _check_round_trip(kind: str, name: str) -> None:
    unit = _build(kind, name)
    again = _build(kind, name, unit.model_dump(mode="json"))  # type: ignore[attr-defined]
    require(again == unit, "its settings differ after they were written to a recipe and read again")


def _make_metric_check(name: str) -> tuple[str, Callable[[], object]]:
    probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    return "measures probabilities", lambda: measure([name], probabilities, np.array([0, 1, 1, 0]))


def _make_callback_check(name: str) -> tuple[str, Callable[[], object]]:
    return "can be called", lambda: load_callbacks([name])


def _make_partition_check(name: str) -> tuple[str, Callable[[], object]]:
    labels, sizes = np.arange(12) % 3, np.arange(12) + 1
    settings = PlugInPartition(kind=name, settings={})

    def assign() -> None:
        first, second = (assign_groups(settings, labels, sizes, 3, np.random.default_rng(1)) for _ in range(2))
        require(bool((first == second).all()), "the same seed gives another partition")

    return "shares twelve groups over three clients", assign


def _make_source_check(group: str) -> Callable[[str], tuple[str, Callable[[], object]]]:
    def load(name: str) -> None:
        plug_in = find_plug_in(group, name, "source")
        require(plug_in is not None and callable(plug_in.load("source")), "its entry point is no function")

    return lambda name: ("is a function", lambda: load(name))


_UNITS: Mapping[str, Callable[[str], Iterator[CheckResult]]] = {
    "technique": check_technique,
    "merge": check_merge_step,
    "task": check_task,
    "continual": check_continual_method,
    "algorithm": check_algorithm_unit,
    "attack": check_attack,
    "codec": check_codec,
}
_SINGLE: Mapping[str, Callable[[str], tuple[str, Callable[[], object]]]] = {
    "metric": _make_metric_check,
    "callback": _make_callback_check,
    "partition": _make_partition_check,
    "data source": _make_source_check("fedtune.data_sources"),
    "model source": _make_source_check("fedtune.model_sources"),
}
