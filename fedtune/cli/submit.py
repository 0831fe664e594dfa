"""``fedtune submit``: hand a recipe to a server, which runs it on the devices that joined."""

from pathlib import Path

import click

from fedtune.cli.connection import connect, server_option

__all__ = ["submit"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("--techniques", metavar="A+B", help="Short for --set train.techniques=A+B.")
@click.option("--watch", is_flag=True, help="Follow the run to its end.")
@server_option
def submit(recipe: Path, overrides: tuple[str, ...], techniques: str | None, watch: bool, server: Path | None) -> None:
    """Run the federation RECIPE describes on the devices of a server; settings are sent, never code.

    \b
    Example:
      fedtune submit recipes/devices.yaml --watch
    """
    import json

    from fedtune.cli.follow import follow
    from fedtune.recipe_file import read
    from fedtune.training.resolve import resolve

    added = (*overrides, f"train.techniques={techniques}") if techniques else overrides
    whole = resolve(read(recipe, added))
    with connect(server) as connection:
        run = connection.ask("POST", "runs", {"recipe": json.loads(whole.model_dump_json())})["run"]
        if watch:
            follow(connection, run)
            return
    click.echo(f"run       {run}")
    click.echo(f"try next  fedtune runs watch {run}")
