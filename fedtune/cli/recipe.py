"""``fedtune recipe``: rewrite a recipe in the newest version."""

from pathlib import Path

import click

__all__ = ["recipe"]


@click.group()
def recipe() -> None:
    """Rewrite recipes in the newest version."""


@recipe.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: FILE]")
def upgrade(file: Path, output: Path | None) -> None:
    """Rewrite the recipe FILE in version 2; comments, order and layout stay the same.

    \b
    Example:
      fedtune recipe upgrade my-recipe.yaml
      fedtune recipe upgrade old.yaml -o new.yaml
    """
    from fedtune.files import write_bytes_atomically
    from fedtune.recipe.upgrade import upgrade_recipe_text
    from fedtune.recipe.versions import VERSION
    from fedtune.recipe.yaml_file import read_text_file

    read_text_file(file, "the recipe")  # raises an error with one sentence
    mode = file.stat().st_mode
    before = file.read_bytes().decode()  # with its own line ends
    upgraded = upgrade_recipe_text(before, str(file))
    if upgraded == before and output is None:
        click.echo(f"{file} is of version {VERSION} already")
        return
    place = (output or file).resolve()  # a link stays one
    write_bytes_atomically(place, upgraded.encode())
    place.chmod(mode)
    click.echo(f"{output or file} is of version {VERSION}")
