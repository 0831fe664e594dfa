"""``fedtune simulate``: run a federation on this machine, or resume one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
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
    store: str | None,
    as_json: bool,
) -> None:
    """Run RECIPE on this machine. The run store keeps all results.

    \b
    Example:
      fedtune simulate recipes/sentiment.yaml
      fedtune simulate recipes/sentiment.yaml --techniques lora+gradient-checkpointing --set train.lr=1e-3
      fedtune simulate --resume latest
      fedtune simulate --extend latest --rounds 32
    """
    from fedtune.cli.cached_export import export_base_run
    from fedtune.tracking import Store, get_default_url

    if sum(given is not None for given in (recipe, resumed, extended)) != 1:
        raise click.UsageError("name either a RECIPE or a run with --resume or --extend, e.g. recipes/sentiment.yaml")
    if recipe is None and (overrides or techniques):
        raise click.UsageError("a resumed run keeps its recipe; remove --set and --techniques")
    if (extended is None) != (rounds is None):
        raise click.UsageError("--extend RUN and --rounds N go together, e.g. --extend latest --rounds 32")
    added = (*overrides, f"train.techniques={techniques}") if techniques else overrides
    url = store or get_default_url()
    with Store.open(url) as opened:
        if recipe is not None:
            run, context = _begin(opened, export_base_run(_resolved(recipe, added), url, new=True), engine)
        elif rounds is not None:
            run, context = _extend(opened, str(extended), rounds, url)
        else:
            run, context = _reopen(opened, str(resumed), url)
        _execute(context, run, url, opened.run(run).engine, workers)
        _show(opened, context, run, as_json)


def _resolved(path: Path, overrides: tuple[str, ...]) -> "Recipe":
    from fedtune.recipe.yaml_file import read_recipe
    from fedtune.server.recipe_check import check_recipe_settings
    from fedtune.server.selection import check_enough_eligible_clients

    recipe = check_recipe_settings(read_recipe(path, overrides))
    check_enough_eligible_clients(recipe)
    return recipe


def _begin(store: "Store", recipe: "Recipe", engine: str) -> tuple[str, "RunContext"]:
    """Build everything first, so that a run that cannot start leaves no row in the store."""
    from fedtune.tracking import new_run_id

    context = _build_context(recipe)
    run = new_run_id(recipe.name)
    store.create_run(
        id=run,
        name=recipe.name,
        recipe=context.recipe.model_dump_json(),
        seed=recipe.seed,
        engine=engine,
        rounds_planned=recipe.federation.rounds,
    )
    return run, context


def _reopen(store: "Store", reference: str, url: str) -> tuple[str, "RunContext"]:
    from fedtune.cli.cached_export import export_base_run

    found = store.run(reference)
    context = _build_context(export_base_run(_read_recorded(found), url))
    store.reopen(found.id)
    return found.id, context


def _read_recorded(run: "RunRecord") -> "Recipe":
    """Read the recipe of a run. One line says so if its version is older."""
    import json

    from fedtune.recipe.schema import Recipe
    from fedtune.recipe.versions import VERSION, needs_translation

    if needs_translation(json.loads(run.recipe)):
        click.echo(f"run {run.id} has a recipe of version 1; it is read as version {VERSION}", err=True)
    return Recipe.model_validate_json(run.recipe)


def _extend(store: "Store", reference: str, rounds: int, url: str) -> tuple[str, "RunContext"]:
    """Add rounds to a run of this machine."""
    from fedtune.cli.cached_export import export_base_run
    from fedtune.errors import StoreError
    from fedtune.tracking import claim_run
    from fedtune.training.optimisers import compute_lr_factor

    found = store.run(reference)
    recipe = export_base_run(_read_recorded(found), url)
    if found.engine not in ("in-process", "flower"):
        raise StoreError(f"run {found.id} belongs to a server; submit a recipe that starts from its export instead")
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
    return found.id, context


def _build_context(recipe: "Recipe") -> "RunContext":
    from fedtune.server.recipe_check import build_run_context

    if sys.stderr.isatty():
        click.echo(f"reading {recipe.data.source} and {recipe.model.source}", err=True)
    context = build_run_context(recipe)
    _ = context.client_rows, context.train
    for note in context.corpus.notes:
        click.echo(f"warning: {note}", err=True)
    return context


def _execute(context: "RunContext", run: str, url: str, engine: str, workers: int | None) -> None:
    from fedtune.cli.run_progress import show_run_progress
    from fedtune.simulation import choose_worker_count, run_in_process

    recipe = context.recipe
    with show_run_progress(recipe.federation.rounds):
        if engine == "flower":
            from fedtune.simulation.flower_engine import run_on_flower_engine

            run_on_flower_engine(recipe, run, url)
        else:
            run_in_process(context, run, url, workers or choose_worker_count(context))


def _show(store: "Store", context: "RunContext", run: str, as_json: bool) -> None:
    """Print the table, the plot and the next commands, or the run as JSON."""
    record, rounds = store.run(run), store.rounds(run)
    if as_json:
        from fedtune.json_text import json_text
        from fedtune.tracking.run_json import make_run_document

        click.echo(json_text(make_run_document(record, rounds)))
        return
    from rich.console import Console

    from fedtune import paths
    from fedtune.cli.domain_table import make_domain_rows, show_domain_table
    from fedtune.cli.privacy_text import describe_privacy
    from fedtune.tracking.run_plot import draw_runs

    figure = context.main_metric
    console = Console(markup=False)
    console.print()
    if rows := make_domain_rows(
        rounds, context.client_domains, figure
    ):  # none where the server has no whole model to score
        show_domain_table(rows, figure, console)
    if private := describe_privacy(record, rounds):
        click.echo(f"\nprivacy   {private}")
    plot = paths.get_runs_folder() / run / "run.png"
    draw_runs([(record, rounds)], plot)
    click.echo(f"\nplot      {plot}")
    click.echo(f"try next  fedtune runs show {run}")
    click.echo(f"          fedtune export {run} -o {record.name}-model")
