"""``fedtune data``: show the examples of a recipe before training."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedtune.cli.example_view import decode_examples, show_examples
from fedtune.cli.source_view import make_source_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fedtune.data import PartitionSummary, SourceCounts
    from fedtune.tasks import Segment

__all__ = ["data"]

MAX_ROWS = 40
_MAX_COLUMNS = 8
"""More values of a label or domain than these do not fit beside each other."""
_NAMED_VALUES = 3


@click.group()
def data() -> None:
    """Show the data of a recipe and its partition over clients."""


@data.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plot (PNG).")
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    help="Training examples to print with their targets; by default 3 where they are texts. 0: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def show(recipe: Path, overrides: tuple[str, ...], output: Path | None, examples: int | None, as_json: bool) -> None:
    """Show how many examples of each label every client has, as a table and a plot.

    Also how the first training examples are read. What is a target stands in [[double brackets]].

    \b
    Example:
      fedtune data show recipes/sentiment.yaml --set data.partition.kind=iid
      fedtune data show recipes/instruct.yaml --examples 5
    """
    from rich.console import Console

    from fedtune import data as library
    from fedtune import tasks
    from fedtune.cli.task_table import make_task_table
    from fedtune.continual import partition_stream
    from fedtune.data.partition_plot import draw_partition
    from fedtune.paths import get_home_folder
    from fedtune.recipe.yaml_file import read_recipe
    from fedtune.training.stream_tasks import list_stream_tasks

    settings = list_stream_tasks(read_recipe(recipe, overrides))
    corpus = tasks.load_data(settings)
    clients = partition_stream(settings, corpus.train, corpus.label_names)
    summary = library.summarise_partition(settings, corpus, clients)
    decoded = decode_examples(settings, corpus, examples)
    path = output or get_home_folder() / "pictures" / f"{settings.name}-split.png"
    draw_partition(summary, path)
    for note in corpus.notes:
        click.echo(f"warning: {note}", err=True)
    _print(summary, corpus.sources, path, decoded, as_json)
    if settings.stream is not None and not as_json:
        Console(markup=False).print(make_task_table(settings, corpus))


def _print(
    summary: "PartitionSummary",
    sources: "Sequence[SourceCounts]",
    path: Path,
    decoded: "list[list[Segment]]",
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from fedtune.json_text import json_text

    if as_json:
        listed = [[segment._asdict() for segment in segments] for segments in decoded]
        counted = {"sources": [asdict(source) for source in sources]} if sources else {}
        shown = {"examples": listed} if listed else {}
        click.echo(json_text({**asdict(summary), **counted, "plot": str(path), **shown}))
        return
    console = Console(markup=False)
    if sources:
        console.print(make_source_table(sources))
    console.print(_table(summary))
    if (hidden := len(summary.holdings) - MAX_ROWS) > 0:
        click.echo(f"and {hidden} more clients; --json lists them all")
    click.echo(f"plot: {path}")
    show_examples(decoded)


def _table(summary: "PartitionSummary") -> "Table":
    from rich.table import Table

    sizes = ", ".join(f"{count} {part}" for part, count in summary.parts.items())
    table = Table(title=f"{summary.name}: {sizes}", box=None, header_style="bold", title_justify="left")
    values = summary.values if 1 < len(summary.values) <= _MAX_COLUMNS else ()
    headings = (*values, *(() if values or len(summary.values) < 2 else ("most of",)))
    for heading in ("client", "device", "examples", "groups", *headings):
        table.add_column(heading, justify="left" if heading in ("device", "most of") else "right")
    for holding in summary.holdings[:MAX_ROWS]:
        counts = tuple(map(str, holding.counts)) if values else (_describe_counts(summary.values, holding.counts),)
        cells = (holding.client, holding.device, holding.examples, holding.groups)
        table.add_row(*map(str, cells), *counts[: len(headings)])
    return table


def _describe_counts(values: "Sequence[str]", counts: "Sequence[int]") -> str:
    """Return the values that a client has most examples of, with their numbers."""
    order = sorted(range(len(values)), key=lambda place: -counts[place])
    held = [f"{values[place]} {counts[place]}" for place in order if counts[place]]
    more = f", and {len(held) - _NAMED_VALUES} more" if len(held) > _NAMED_VALUES else ""
    return ", ".join(held[:_NAMED_VALUES]) + more
