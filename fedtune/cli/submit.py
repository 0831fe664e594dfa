"""``fedtune submit``: send a recipe to a server, which runs it on the devices that joined."""

from pathlib import Path

import click

from fedtune.cli.operator_client import add_operator_file_option, connect_to_server

__all__ = ["submit"]

_CHECK_SECONDS = 1200.0
"""The server loads the recipe's model and data for the check, and may have to download them."""
_SENTENCE = 300
"""How many characters of a sentence from the server are shown."""


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("--techniques", metavar="A+B", help="Short for --set train.techniques=A+B.")
@click.option("--watch", is_flag=True, help="Follow the run to its end.")
@add_operator_file_option
def submit(
    recipe: Path, overrides: tuple[str, ...], techniques: str | None, watch: bool, operator_file: Path | None
) -> None:
    """Run RECIPE on the devices of a server. Only settings are sent, never code.

    \b
    Example:
      fedtune submit recipes/devices.yaml --watch
    """
    import json

    from fedtune.cli.follow_run import follow_run
    from fedtune.recipe.yaml_file import read_recipe
    from fedtune.untrusted import clean_text

    added = (*overrides, f"train.techniques={techniques}") if techniques else overrides
    chosen = read_recipe(recipe, added)  # what its techniques and merge steps allow is checked by the server
    with connect_to_server(operator_file) as connection:
        click.echo(f"sending {recipe} to {connection.url}, which checks it", err=True)
        sent = {"recipe": json.loads(chosen.model_dump_json())}
        reply = connection.request_json("POST", "runs", sent, timeout_seconds=_CHECK_SECONDS)
        run = reply["run"]
        for sentence in reply.get("plans", ()):  # an older server has none
            click.echo(clean_text(sentence, _SENTENCE), err=True)
        click.echo(f"run       {run}")
        if watch:
            click.echo("following the run; Ctrl-C stops the display, not the run", err=True)
            follow_run(connection, run)
            return
    click.echo(f"try next  fedtune runs watch {run}")
