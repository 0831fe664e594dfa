"""Runs of this machine: begin, resume and execute them. ``fedtune simulate`` and the library share this module."""

import json
import warnings
from typing import TYPE_CHECKING, NamedTuple

from fedtune.errors import FedtuneWarning
from fedtune.library.cached_export import export_base_run
from fedtune.plan.device_plans import describe_plans
from fedtune.recipe.recorded_recipe import parse_recorded_recipe
from fedtune.recipe.schema import Recipe
from fedtune.recipe.versions import needs_translation
from fedtune.server.planned_techniques import plan_techniques
from fedtune.server.recipe_check import build_run_context, check_recipe_settings
from fedtune.server.selection import check_enough_eligible_clients
from fedtune.simulation.compute_devices import require_devices
from fedtune.tracking import RunRecord, Store, new_run_id

if TYPE_CHECKING:
    from fedtune.training import RunContext

__all__ = [
    "LocalRun",
    "begin_run",
    "build_simulation_context",
    "check_simulated_recipe",
    "execute_run",
    "plan_recipe_techniques",
    "read_recorded_recipe",
]


class LocalRun(NamedTuple):
    """A run that the store holds, and what was built for it."""

    id: str
    context: "RunContext"


def check_simulated_recipe(recipe: Recipe, store: str, workers: int | None = None) -> Recipe:
    """The recipe with every setting written out, and its base run exported; raise FedtuneError if it cannot run."""
    require_devices(recipe, workers)
    checked = check_recipe_settings(plan_recipe_techniques(recipe, store))
    check_enough_eligible_clients(checked)
    return export_base_run(checked, store, new=True)


def plan_recipe_techniques(recipe: Recipe, store: str) -> Recipe:
    """Replace ``techniques: auto`` by a plan for each device class, with a warning that names them.

    What earlier runs in the store taught about the memory of a class is applied.
    """
    planned = plan_techniques(recipe, store)
    for sentence in describe_plans(planned) if planned is not recipe else ():
        warnings.warn(sentence, FedtuneWarning, stacklevel=3)
    return planned


def build_simulation_context(recipe: Recipe) -> "RunContext":
    """Load the model and the data, and partition the data over the clients."""
    context = build_run_context(recipe)
    _ = context.client_rows, context.train
    return context


def begin_run(store: Store, context: "RunContext", engine: str) -> LocalRun:
    """Record a new run. Everything was built before, so that a run that cannot start leaves no row in the store."""
    recipe = context.recipe
    run = new_run_id(recipe.name)
    store.create_run(
        id=run,
        name=recipe.name,
        recipe=recipe.model_dump_json(),
        seed=recipe.seed,
        engine=engine,
        rounds_planned=recipe.federation.rounds,
    )
    return LocalRun(run, context)


def read_recorded_recipe(run: RunRecord) -> tuple[Recipe, bool]:
    """The recipe of a run, and whether it was recorded in version 1."""
    return parse_recorded_recipe(run.recipe, run.id), needs_translation(json.loads(run.recipe))


def execute_run(run: LocalRun, store: str, engine: str, workers: int | None, *, enforce_memory: bool = False) -> None:
    """Carry a run to its end on an engine. Only the in-process engine can enforce the memory of device classes."""
    if engine == "flower":
        from fedtune.simulation.flower_engine import run_on_flower_engine

        run_on_flower_engine(run.context.recipe, run.id, store)
    else:
        from fedtune.simulation import choose_worker_count, run_in_process

        count = workers or choose_worker_count(run.context)
        run_in_process(run.context, run.id, store, count, enforce_memory=enforce_memory)
