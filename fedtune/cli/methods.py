"""``fedtune methods``: list techniques and merge steps, and print their cards."""

from collections.abc import Mapping, Sequence

import click

from fedtune.json_text import json_text

__all__ = ["methods"]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def methods(name: str | None, as_json: bool) -> None:
    """List techniques and merge steps, or print the card of NAME.

    \b
    Example:
      fedtune methods
      fedtune methods lora
    """
    from fedtune.errors import RecipeError
    from fedtune.recipe.unit_registry import describe_unit_settings, list_unit_names, read_unit_card
    from fedtune.recipe.validation_errors import suggest_nearest
    from fedtune.recipe.version_names import UNIT_NAMES

    rooms = {"technique": "fedtune.techniques", "merge": "fedtune.merging"}
    known = {found: (kind, package) for kind, package in rooms.items() for found in list_unit_names(package)}
    name = name and UNIT_NAMES.get(name, name)
    if name is not None and name not in known:
        raise RecipeError(f"there is no method {name!r}; {suggest_nearest(name, list(known))}")
    rows = [
        {
            "name": found,
            "kind": kind,
            "card": read_unit_card(package, found),
            "settings": describe_unit_settings(package, found),
        }
        for found, (kind, package) in known.items()
        if name in (None, found)
    ]
    if as_json:
        click.echo(json_text(rows if name is None else rows[0]))
    elif name is not None:
        _show_card(rows[0])
    else:
        _show_list(rows)


def _show_list(rows: Sequence[Mapping[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "kind", "in one line", box=None, header_style="bold")
    for row in rows:
        first = str(row["card"]).splitlines()[0]
        table.add_row(str(row["name"]), str(row["kind"]), first.partition(": ")[2] or first)
    Console(markup=False).print(table)
    click.echo("\nPrint a card: fedtune methods lora. Combine techniques: --techniques lora+gradient-checkpointing")


def _show_card(row: Mapping[str, object]) -> None:
    click.echo(str(row["card"]).strip())
    lines = row["settings"]
    assert isinstance(lines, list)
    click.echo("\nSettings:" if lines else "\nSettings: none")
    for line in lines:
        click.echo(f"  {line}")
