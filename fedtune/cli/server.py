"""``fedtune server``: make a server's home, keep the server up, let devices in and out."""

from pathlib import Path

import click

from fedtune.cli import server_access, server_view
from fedtune.cli.connection import connect, server_option
from fedtune.cli.server_view import json_option, shown

__all__ = ["server"]


@click.group()
def server() -> None:
    """A server that real devices join; its home is $FEDTUNE_HOME/server."""


for _command in (server_access.audit, server_access.operator, server_access.operators, server_access.tokens):
    server.add_command(_command)


@server.command()
@click.option("--name", "names", multiple=True, metavar="NAME", help="A host name or address devices will use.")
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:8443", show_default=True)
def init(names: tuple[str, ...], listen: str) -> None:
    """Make a server's home: an authority, a certificate, keys, settings.

    \b
    Example:
      fedtune server init --name fedtune.lab.example --name 10.0.0.5 --listen 0.0.0.0:8443
    """
    from fedtune.tracking import Store
    from server.home import create
    from server.operators import add

    made = create(list(names) or ["localhost"], listen)
    with Store.open(made.settings.store) as store:
        add(made, store.access, "local", made.operator)
    click.echo(f"made      {made.folder}")
    click.echo(f"settings  {made.folder / 'server.yaml'}")
    click.echo("try next  fedtune server up")


@server.command()
def up() -> None:
    """Serve until Ctrl-C: devices join, submitted runs are carried on.

    Example: fedtune server up
    """
    from server.home import open_home
    from server.supervisor import up as serve

    serve(open_home())


@server.command()
@click.argument("name", metavar="[DEVICE]", default="")
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=24.0, show_default=True)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="What recipes select the device by.")
@server_option
def token(name: str, hours: float, tags: tuple[str, ...], server: Path | None) -> None:
    """Print a one-time token for a device, which it enrolls with.

    Example: fedtune server token kitchen-pi --tag indoors
    """
    with connect(server) as connection:
        click.echo(connection.ask("POST", "tokens", {"name": name, "hours": hours, "tags": tags})["token"])


@server.command()
@click.option("--tag", "added", nargs=2, multiple=True, metavar="DEVICE TAG", help="Give a device a tag first.")
@click.option("--untag", "taken", nargs=2, multiple=True, metavar="DEVICE TAG", help="Take a tag from a device first.")
@server_option
@json_option
def devices(
    added: tuple[tuple[str, str], ...], taken: tuple[tuple[str, str], ...], server: Path | None, as_json: bool
) -> None:
    """Enrolled devices, which of them are connected, and the tags by which recipes select them.

    \b
    Example:
      fedtune server devices
      fedtune server devices --tag kitchen-pi indoors
    """
    with connect(server) as connection:
        for change, pairs in (("add", added), ("remove", taken)):
            for device, tag in pairs:
                connection.ask("POST", f"devices/{device}/tags", {change: [tag]})
        found = connection.ask("GET", "devices")["devices"]
    shown(found, server_view.DEVICES, as_json)


@server.command()
@click.argument("device")
@server_option
def remove(device: str, server: Path | None) -> None:
    """Shut a device out: its key is worthless from now on.

    Example: fedtune server remove kitchen-pi
    """
    with connect(server) as connection:
        click.echo(f"removed: {connection.ask('DELETE', f'devices/{device}')['device']}")


@server.command()
@server_option
@json_option
def runs(server: Path | None, as_json: bool) -> None:
    """Runs that were submitted to it, newest first; one of them round by round: fedtune runs watch RUN.

    Example: fedtune server runs --server ada.json
    """
    with connect(server) as connection:
        found = connection.ask("GET", "runs")["runs"]
    shown(found, server_view.RUNS, as_json)
