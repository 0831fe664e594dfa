"""``fedtune methods``: list techniques, merge steps, algorithms, codecs and tasks, and print their cards."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fedtune.json_text import json_text

if TYPE_CHECKING:
    from fedtune.library.method_list import Method

__all__ = ["methods"]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def methods(name: str | None, as_json: bool) -> None:
    """List techniques, merge steps, algorithms, codecs and tasks, or print the card of NAME.

    Methods that other installed packages publish are listed with their package.

    \b
    Example:
      fedtune methods
      fedtune methods lora
    """
    from fedtune.errors import RecipeError
    from fedtune.library.method_list import describe_method, list_methods
    from fedtune.recipe.validation_errors import suggest_nearest
    from fedtune.recipe.version_names import UNIT_NAMES

    known = list_methods()
    name = name and UNIT_NAMES.get(name, name)
    found = [describe_method(kind, one) for kind, one in known if name in (None, one)]
    if not found:
        raise RecipeError(f"there is no method {name!r}; {suggest_nearest(str(name), [one for _, one in known])}")
    if name is not None and found[0].problem is not None:
        raise RecipeError(found[0].problem)
    if as_json:
        click.echo(json_text([one._asdict() for one in found] if name is None else found[0]._asdict()))
    elif name is not None:
        _show_card(found[0])
    else:
        _show_list(found)


def _show_list(found: "Sequence[Method]") -> None:
    from rich.console import Console
    from rich.table import Table

    others = any(one.package != "fedtune" for one in found)
    table = Table("method", "kind", *(["from"] if others else []), "in one line", box=None, header_style="bold")
    for one in found:
        table.add_row(one.name, one.kind, *([one.package] if others else []), one.summary)
    Console(markup=False).print(table)
    click.echo("\nPrint a card: fedtune methods lora. Combine techniques: --techniques lora+gradient-checkpointing")


def _show_card(method: "Method") -> None:
    click.echo(method.card.strip())
    if method.package != "fedtune":
        click.echo(f"\nFrom the package {method.package}.")
    click.echo("\nSettings:" if method.settings else "\nSettings: none")
    for line in method.settings:
        click.echo(f"  {line}")
