"""``fedtune simulate``: run a federation on this machine, or resume one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fedtune.library.local_runs import LocalRun
    from fedtune.recipe.schema import Recipe
    from fedtune.tracking import RunRecord, Store
    from fedtune.training import RunContext

__all__ = ["simulate"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("--techniques", metavar="A+B", help="Short for --set train.techniques=A+B.")
@click.option("--resume", "resumed", metavar="RUN", help="Resume a stopped run at its next round.")
@click.option("--extend", "extended", metavar="RUN", help="Add rounds to a run, up to --rounds in all.")
@click.option("--rounds", type=click.IntRange(1), help="With --extend: total number of rounds.")
@click.option(
    "--engine",
    type=click.Choice(["in-process", "flower"]),
    default="in-process",
    show_default=True,
    help="Where clients run.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes that run clients.  [default: one per core]")
@click.option("--enforce-memory", is_flag=True, help="Hold clients to the memory of their device class.")
@click.option("--callback", "callbacks", multiple=True, metavar="NAME", help="Callback of a package; repeatable.")
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store.")
@click.option("--json", "as_json", is_flag=True, help="Print the finished run as JSON.")
def simulate(
    recipe: Path | None,
    overrides: tuple[str, ...],
    techniques: str | None,
    resumed: str | None,
    extended: str | None,
    rounds: int | None,
    engine: str,
    workers: int | None,
    enforce_memory: bool,
    callbacks: tuple[str, ...],
    store: str | None,
    as_json: bool,
) -> None:
    """Run RECIPE on this machine. The run store keeps all results.

    With --enforce-memory, each client runs in a process that may take the memory of its device class and no more: it
    halves its micro-batch where a step would not fit, and declines the round if that is not enough. Without it, a
    warning at the end names the classes whose clients held more.

    \b
    Example:
      fedtune simulate recipes/sentiment.yaml
      fedtune simulate recipes/sentiment.yaml --techniques lora+gradient-checkpointing --set train.lr=1e-3
      fedtune simulate --resume latest
      fedtune simulate --extend latest --rounds 32
    """
    from fedtune.cli.run_progress import show_run_progress
    from fedtune.library.local_runs import begin_run, check_simulated_recipe, execute_run
    from fedtune.library.run_callbacks import load_callbacks, pass_events
    from fedtune.recipe.yaml_file import read_recipe
    from fedtune.simulation.enforcement import require_enforceable
    from fedtune.tracking import Store, get_default_url

    if sum(given is not None for given in (recipe, resumed, extended)) != 1:
        raise click.UsageError("name either a RECIPE or a run with --resume or --extend, e.g. recipes/sentiment.yaml")
    if recipe is None and (overrides or techniques):
        raise click.UsageError("a resumed run keeps its recipe; remove --set and --techniques")
    if (extended is None) != (rounds is None):
        raise click.UsageError("--extend RUN and --rounds N go together, e.g. --extend latest --rounds 32")
    added = (*overrides, f"train.techniques={techniques}") if techniques else overrides
    url, called = store or get_default_url(), load_callbacks(callbacks)
    with Store.open(url) as opened:
        if enforce_memory and recipe is None:
            recorded = opened.run(str(resumed or extended))
            require_enforceable(_read_recorded(recorded), recorded.engine)
        if recipe is not None:
            checked = check_simulated_recipe(read_recipe(recipe, added), url, workers)
            if enforce_memory:
                require_enforceable(checked, engine)
            _suggest_accelerator(checked)
            run = begin_run(opened, _build_context(checked), engine)
        elif rounds is not None:
            run = _extend(opened, str(extended), rounds, url, workers)
        else:
            run = _reopen(opened, str(resumed), url, workers)
        with show_run_progress(run.context.recipe.federation.rounds), pass_events(called, keep=True):
            execute_run(run, url, opened.run(run.id).engine, workers, enforce_memory=enforce_memory)
        _show(opened, run, as_json)
        _warn_of_memory(opened, run)


def _warn_of_memory(store: "Store", run: "LocalRun") -> None:
    """Name the device classes whose clients held more memory than the recipe gives them."""
    from fedtune.simulation.enforcement import describe_memory_excesses

    for sentence in describe_memory_excesses(run.context.recipe, store.rounds(run.id)):
        click.echo(f"warning: {sentence}", err=True)


def _reopen(store: "Store", reference: str, url: str, workers: int | None) -> "LocalRun":
    from fedtune.library.cached_export import export_base_run
    from fedtune.library.local_runs import LocalRun

    found = store.run(reference)
    context = _build_context(export_base_run(_read_resumable(store, found, workers), url))
    store.reopen(found.id)
    return LocalRun(found.id, context)


def _read_recorded(run: "RunRecord") -> "Recipe":
    """Read the recipe of a run. One line says so if its version is older."""
    from fedtune.library.local_runs import read_recorded_recipe
    from fedtune.recipe.versions import VERSION

    recipe, translated = read_recorded_recipe(run)
    if translated:
        click.echo(f"run {run.id} has a recipe of version 1; it is read as version {VERSION}", err=True)
    return recipe


def _read_resumable(store: "Store", run: "RunRecord", workers: int | None) -> "Recipe":
    """Read the recipe of a run that continues here. One line says so if the type of the device changes."""
    from fedtune.simulation.compute_devices import describe_device_change, require_devices

    recipe = _read_recorded(run)
    require_devices(recipe, workers)
    if changed := describe_device_change(store.rounds(run.id), recipe):
        click.echo(f"warning: {changed}", err=True)
    return recipe


def _suggest_accelerator(recipe: "Recipe") -> None:
    from fedtune.simulation.compute_devices import suggest_accelerator

    if suggestion := suggest_accelerator(recipe):
        click.echo(suggestion, err=True)


def _extend(store: "Store", reference: str, rounds: int, url: str, workers: int | None) -> "LocalRun":
    """Add rounds to a run of this machine."""
    from fedtune.errors import StoreError
    from fedtune.library.cached_export import export_base_run
    from fedtune.library.local_runs import LocalRun
    from fedtune.server.early_stopping import SPLIT
    from fedtune.tracking import claim_run
    from fedtune.training.optimisers import compute_lr_factor

    found = store.run(reference)
    recipe = export_base_run(_read_resumable(store, found, workers), url)
    if found.engine not in ("in-process", "flower"):
        raise StoreError(f"run {found.id} belongs to a server; submit a recipe that starts from its export instead")
    if any(metric.split == SPLIT for record in store.rounds(found.id) for metric in record.metrics):
        raise StoreError(
            f"run {found.id} {found.reason}, and more rounds would end again; start a new run from it with "
            f"model.source=run:{found.id}"
        )
    if recipe.stream is not None:
        raise StoreError(
            f"run {found.id} has a stream, whose tasks decide its rounds; start a new run from it with "
            f"model.source=run:{found.id}"
        )
    if rounds <= found.rounds_planned:
        raise StoreError(
            f"run {found.id} already has {found.rounds_planned} rounds; --rounds is the total, so give a larger number"
        )
    federation = recipe.federation.model_copy(update={"rounds": rounds})
    longer = recipe.model_copy(update={"federation": federation})
    context = _build_context(longer)
    with claim_run(found.id):
        store.extend(found.id, longer.model_dump_json(), rounds)
    if recipe.train.lr_schedule != "constant":
        factor = compute_lr_factor(longer.train, found.rounds_planned / rounds)
        start = f"round {found.rounds_planned + 1} starts at {factor:.2g} of train.lr"
        click.echo(f"the {recipe.train.lr_schedule} schedule now covers {rounds} rounds: {start}", err=True)
    return LocalRun(found.id, context)


def _build_context(recipe: "Recipe") -> "RunContext":
    from fedtune.library.local_runs import build_simulation_context

    if sys.stderr.isatty():
        click.echo(f"reading {recipe.data.title} and {recipe.model.source}", err=True)
    context = build_simulation_context(recipe)
    for note in context.corpus.notes:
        click.echo(f"warning: {note}", err=True)
    return context


def _show(store: "Store", run: "LocalRun", as_json: bool) -> None:
    """Print the table, the plot and the next commands, or the run as JSON."""
    record, rounds = store.run(run.id), store.rounds(run.id)
    if as_json:
        from fedtune.json_text import json_text
        from fedtune.tracking.run_json import make_run_document

        click.echo(json_text(make_run_document(record, rounds)))
        return
    from rich.console import Console

    from fedtune import paths
    from fedtune.cli.domain_table import make_domain_rows, show_domain_table
    from fedtune.library.privacy_text import describe_privacy
    from fedtune.tracking.run_plot import draw_runs

    figure = run.context.main_metric
    console = Console(markup=False)
    console.print()
    if rows := make_domain_rows(
        rounds, run.context.client_domains, figure
    ):  # none where the server has no whole model to score
        show_domain_table(rows, figure, console)
    if private := describe_privacy(record, rounds):
        click.echo(f"\nprivacy   {private}")
    if record.reason:
        click.echo(f"\n{record.reason}")
    plot = paths.get_runs_folder() / run.id / "run.png"
    draw_runs([(record, rounds)], plot)
    click.echo(f"\nplot      {plot}")
    click.echo(f"try next  fedtune runs show {run.id}")
    click.echo(f"          fedtune export {run.id} -o {record.name}-model")
