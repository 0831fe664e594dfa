"""``fedtune.simulate``: run a federation on this machine from Python."""

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from fedtune.errors import FedtuneWarning, StoreError
from fedtune.library.cached_export import export_base_run
from fedtune.library.local_runs import (
    LocalRun,
    begin_run,
    build_simulation_context,
    check_simulated_recipe,
    execute_run,
    read_recorded_recipe,
)
from fedtune.library.recipe_input import Overrides, RecipeInput, make_recipe
from fedtune.library.recorded_run import Run
from fedtune.library.run_callbacks import Callback, load_callbacks, pass_events
from fedtune.recipe.schema import Recipe
from fedtune.simulation.compute_devices import describe_device_change, require_devices
from fedtune.tracking import Store, get_default_url

__all__ = ["StopRun", "simulate"]


class StopRun(KeyboardInterrupt):  # like Ctrl-C, so that no code takes it for an error that it could handle
    """Raised by a callback to stop a run cleanly after its last committed round. The run can be resumed."""


def simulate(
    recipe: RecipeInput | Run,
    *,
    overrides: Overrides = (),
    callbacks: Sequence[Callback | str] = (),
    engine: Literal["in-process", "flower"] = "in-process",
    workers: int | None = None,
    store: str | None = None,
) -> Run:
    """Run a recipe, or resume a run that was stopped, with the same bits as ``fedtune simulate``.

    ``recipe`` is a file, a mapping, a ``fedtune.Recipe``, or a ``fedtune.Run`` to resume. A callback is called with
    each event, or is the name of one that an installed package publishes. It may raise ``fedtune.StopRun``; the run is
    then ``interrupted``.

    >>> import fedtune, os, tempfile
    >>> os.environ["FEDTUNE_HOME"] = tempfile.mkdtemp()
    >>> recipe = {"name": "digits", "task": "image-classification", "model": {"source": "sample:logistic"},
    ...           "data": {"source": "sample:digits"}, "devices": [{"count": 4}],
    ...           "train": {"optimiser": "sgd", "lr": 0.03, "local_steps": 2, "image_size": 28},
    ...           "federation": {"rounds": 2}}
    >>> seen = []
    >>> run = fedtune.simulate(recipe, overrides={"federation.rounds": 1}, callbacks=[seen.append], workers=1)
    >>> run.status, [record.number for record in run.rounds]
    ('completed', [0, 1])
    >>> [event.record.number for event in seen if isinstance(event, fedtune.RoundEnded)]
    [0, 1]
    """
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        os.environ.setdefault(name, str(int("DISABLE" in name)))
    called = load_callbacks(callbacks)
    if isinstance(recipe, Run):
        return _resume(recipe, overrides, called, workers)
    url = store or get_default_url()
    with Store.open(url) as opened:
        context = build_simulation_context(check_simulated_recipe(make_recipe(recipe, overrides), url, workers))
        for note in context.corpus.notes:
            warnings.warn(note, FedtuneWarning, stacklevel=2)
        run = begin_run(opened, context, engine)
    return _execute(run, url, engine, called, workers)


def _resume(run: Run, overrides: Overrides, callbacks: Sequence[Callback], workers: int | None) -> Run:
    if overrides:
        raise StoreError(f"run {run.id} keeps its recipe; resume it without overrides")
    with Store.open(run.store) as opened:
        found = opened.run(run.id)
        if found.engine not in ("in-process", "flower"):
            raise StoreError(f"run {found.id} belongs to a server; resume it there: fedtune runs resume {found.id}")
        recorded = read_recorded_recipe(found)[0]
        require_devices(recorded, workers)
        if changed := describe_device_change(opened.rounds(found.id), recorded):
            warnings.warn(changed, FedtuneWarning, stacklevel=3)
        recipe: Recipe = export_base_run(recorded, run.store)
        local = LocalRun(found.id, build_simulation_context(recipe))
        opened.reopen(found.id)
    return _execute(local, run.store, found.engine, callbacks, workers)


def _execute(run: LocalRun, url: str, engine: str, callbacks: Sequence[Callback], workers: int | None) -> Run:
    with pass_events(callbacks), suppress(StopRun):
        execute_run(run, url, engine, workers)
    return Run(run.id, url)
