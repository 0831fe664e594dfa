"""``fedtune.simulate``: run a federation on this machine from Python."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from fedtune.recipe.schema import Recipe
from fedtune.server.events import Event, event_handler
from fedtune.tracking import Store, get_default_url

__all__ = ["Callback", "StopRun", "simulate"]

Callback = Callable[[Event], object]
"""Called with each event of a run: RunStarted, RoundStarted, ReplyReceived, RoundEnded, and those of scoring."""


class StopRun(KeyboardInterrupt):  # like Ctrl-C, so that no code takes it for an error that it could handle
    """Raised by a callback to stop a run cleanly after its last committed round. The run can be resumed."""


def simulate(
    recipe: RecipeInput | Run,
    *,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    engine: Literal["in-process", "flower"] = "in-process",
    workers: int | None = None,
    store: str | None = None,
) -> Run:
    """Run a recipe, or resume a run that was stopped, with the same bits as ``fedtune simulate``.

    ``recipe`` is a file, a mapping, a ``fedtune.Recipe``, or a ``fedtune.Run`` to resume. A callback may raise
    ``fedtune.StopRun``; the run is then ``interrupted``.

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
    if isinstance(recipe, Run):
        return _resume(recipe, overrides, callbacks, workers)
    url = store or get_default_url()
    with Store.open(url) as opened:
        context = build_simulation_context(check_simulated_recipe(make_recipe(recipe, overrides), url))
        for note in context.corpus.notes:
            warnings.warn(note, FedtuneWarning, stacklevel=2)
        run = begin_run(opened, context, engine)
    return _execute(run, url, engine, callbacks, workers)


def _resume(run: Run, overrides: Overrides, callbacks: Sequence[Callback], workers: int | None) -> Run:
    if overrides:
        raise StoreError(f"run {run.id} keeps its recipe; resume it without overrides")
    with Store.open(run.store) as opened:
        found = opened.run(run.id)
        recipe: Recipe = export_base_run(read_recorded_recipe(found)[0], run.store)
        local = LocalRun(found.id, build_simulation_context(recipe))
        opened.reopen(found.id)
    return _execute(local, run.store, found.engine, callbacks, workers)


def _execute(run: LocalRun, url: str, engine: str, callbacks: Sequence[Callback], workers: int | None) -> Run:
    with _called(callbacks), suppress(StopRun):
        execute_run(run, url, engine, workers)
    return Run(run.id, url)


@contextmanager
def _called(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Pass the events of the block to each callback in order."""

    def handle(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    token = event_handler.set(handle)
    try:
        yield
    finally:
        event_handler.reset(token)
