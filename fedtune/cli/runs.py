"""``fedtune runs``: list, show, compare, plot, export and delete recorded runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fedtune.cli import submitted_runs
from fedtune.cli.runs_rollback import rollback
from fedtune.recipe.versions import read_stored_recipe

if TYPE_CHECKING:
    from fedtune.tracking import RoundRecord, RunRecord, Store

__all__ = ["runs"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _add_shared_options(command: Command) -> Command:
    """Add the options that all these commands have."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")(command)
    return click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store.")(command)


_run_argument = click.argument("run", metavar="RUN")
_runs_argument = click.argument("chosen", metavar="RUN...", nargs=-1, required=True)


@click.group()
def runs() -> None:
    """Recorded runs. RUN is an id, a prefix of an id, or "latest"."""


for _command in (submitted_runs.watch, submitted_runs.stop, submitted_runs.resume, rollback):
    runs.add_command(_command)


@runs.command("list")
@_add_shared_options
def list_(store: str | None, as_json: bool) -> None:
    """List all runs, newest first.

    Example: fedtune runs list
    """
    from fedtune.cli import runs_view
    from fedtune.tracking import Store, run_json

    with Store.open(store) as opened:
        found = opened.runs()
        if as_json:
            rounds = opened.rounds_of(run.id for run in found)
            click.echo(run_json.json_text([run_json.make_run_document(run, rounds[run.id]) for run in found]))
        else:
            runs_view.show_list(found, opened.get_latest_metrics())


@runs.command()
@_run_argument
@click.option("--last", type=click.IntRange(1), default=30, show_default=True, help="Number of rounds to show.")
@click.option("--all", "every", is_flag=True, help="Show every round.")
@click.option("--reference", metavar="RUN", help="A run that learned all tasks together, for the intransigence.")
@_add_shared_options
def show(run: str, last: int, every: bool, reference: str | None, store: str | None, as_json: bool) -> None:
    """Show a run: its last rounds, its result by domain, its tasks, its clients. --json prints every round.

    Example: fedtune runs show latest
    """
    from fedtune.cli import runs_view
    from fedtune.tracking import Store, run_json
    from fedtune.tracking.stream_reference import compare_with_reference

    with Store.open(store) as opened:
        [(found, rounds)] = _read_runs(opened, [run])
        compared = compare_with_reference((found, rounds), _read_runs(opened, [reference])[0]) if reference else None
    if as_json:
        document = run_json.make_run_document(found, rounds, detailed=True)
        if compared is not None:
            document["stream"]["figures"] |= {"intransigence": compared.intransigence}
            document["stream"]["reference"] = compared.run_id
        click.echo(run_json.json_text(document))
    else:
        runs_view.show_run(found, rounds, None if every else last, compared)


@runs.command()
@_runs_argument
@_add_shared_options
def compare(chosen: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Compare runs: results, costs and the settings in which they differ.

    Example: fedtune runs compare latest sentiment-2
    """

    from fedtune.cli import runs_view
    from fedtune.tracking import Store, run_json, run_summary

    with Store.open(store) as opened:
        recorded = _read_runs(opened, chosen)
    settings = run_summary.diff_recipes([read_stored_recipe(run.recipe) for run, _ in recorded])
    if as_json:
        documents = [run_json.make_run_document(run, rounds) for run, rounds in recorded]
        click.echo(run_json.json_text({"runs": documents, "differences": settings}))
    else:
        runs_view.show_comparison(recorded, settings)


@runs.command()
@_runs_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A .png or .svg file.")
@_add_shared_options
def plot(chosen: tuple[str, ...], output: Path | None, store: str | None, as_json: bool) -> None:
    """Plot one run, or several runs together.

    Without -o, the plot of one run is written to the run's folder, and that of several runs to runs.png.

    Example: fedtune runs plot latest -o sentiment.svg
    """
    from fedtune import paths as home
    from fedtune.tracking import Store, run_json
    from fedtune.tracking.run_plot import draw_runs

    with Store.open(store) as opened:
        recorded = _read_runs(opened, chosen)
    alone = len(recorded) == 1
    path = output or (home.get_runs_folder() / recorded[0][0].id / "plot.png" if alone else Path("runs.png"))
    draw_runs(recorded, path)
    click.echo(run_json.json_text({"path": str(path.absolute())}) if as_json else f"drawn: {path}")


@runs.command()
@_runs_argument
@click.option("--format", "format_", type=click.Choice(["csv", "parquet", "json"]), default="csv", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A new folder, or a JSON file.")
@_add_shared_options
def export(chosen: tuple[str, ...], format_: str, output: Path, store: str | None, as_json: bool) -> None:
    """Export runs as tables for other programs.

    csv and parquet create a folder with one file each for runs, rounds, client records, metrics, client scores,
    checkpoints, samples, tasks and task scores, joined by run_id and round. json creates one file.

    Example: fedtune runs export latest --format parquet -o sentiment-tables
    """
    from fedtune.tracking import Store, run_json
    from fedtune.tracking.table_export import export_runs

    with Store.open(store) as opened:
        written = export_runs(_read_runs(opened, chosen), format_, output)
    paths = [str(path.absolute()) for path in written]
    click.echo(run_json.json_text({"paths": paths}) if as_json else "\n".join(f"written: {path}" for path in written))


@runs.command()
@_run_argument
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@_add_shared_options
def delete(run: str, yes: bool, store: str | None, as_json: bool) -> None:
    """Delete a run with its checkpoints. A run that is being executed is not deleted.

    Example: fedtune runs delete sentiment-2 --yes
    """
    from fedtune.tracking import Store, claim_run, run_json

    with Store.open(store) as opened:
        found = opened.run(run)
        if not yes:
            click.confirm(f"Remove run {found.id} ({found.rounds_completed} rounds) permanently?", abort=True, err=True)
        with claim_run(found.id):
            # Rows first: files without a row only waste space, but a row without files would be wrong.
            opened.delete(found.id)
            _remove_files(found.id)
    click.echo(run_json.json_text({"deleted": found.id}) if as_json else f"removed: {found.id}")


def _remove_files(run_id: str) -> None:
    import shutil

    from fedtune import paths as home
    from fedtune.errors import StoreError

    try:
        shutil.rmtree(home.get_runs_folder() / run_id)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise StoreError(f"run {run_id} is removed, but its files are not ({reason}); remove them by hand") from error


def _read_runs(store: "Store", references: Sequence[str]) -> list[tuple["RunRecord", list["RoundRecord"]]]:
    found = list({run.id: run for run in map(store.run, references)}.values())
    rounds = store.rounds_of(run.id for run in found)
    return [(run, rounds[run.id]) for run in found]
