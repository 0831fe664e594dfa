"""``fedtune new``: write the start of a package with a method of your own."""

from pathlib import Path

import click

__all__ = ["new"]


@click.command()
@click.argument("kind", type=click.Choice(["technique", "task", "merge-step"]))
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to create.  [default: fedtune-NAME]")
def new(kind: str, name: str, output: Path | None) -> None:
    """Write a small package that publishes a technique, a task or a merge step under NAME.

    Install it, change it, and check it. Recipes can name it at once.

    \b
    Example:
      fedtune new technique my-technique
    """
    from fedtune.library.plug_in_skeleton import write_plug_in

    folder = output or Path(f"fedtune-{name}")
    for path in write_plug_in(kind, name, folder):
        click.echo(str(path))
    click.echo(f"try next  pip install -e {folder}")
    click.echo(f"          fedtune check-plugin {name}")
