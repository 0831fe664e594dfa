"""``fedtune server``: create a server, run it, and enrol and remove devices."""

from pathlib import Path

import click

from fedtune.cli import server_access, server_devices, server_view
from fedtune.cli.operator_client import add_operator_file_option, connect_to_server
from fedtune.cli.server_view import json_option, print_rows
from fedtune.untrusted import clean_lines

__all__ = ["server"]

_LISTEN = "127.0.0.1:8443"
_LONGEST_LOG = 2_000_000


@click.group()
def server() -> None:
    """Run a server for real devices. Its files are in $FEDTUNE_HOME/server."""


for _module in (server_access, server_devices):
    for _name in _module.__all__:
        server.add_command(getattr(_module, _name))


@server.command()
@click.option("--hostname", "names", multiple=True, metavar="NAME", help="Host name or address that devices use.")
@click.option("--listen", metavar="HOST:PORT", help=f"Where to listen.  [default: {_LISTEN}]")
def init(names: tuple[str, ...], listen: str | None) -> None:
    """Create a server, or change its address.

    A new server has a certificate authority, a certificate, keys and settings. If the server exists, --hostname and
    --listen change its address. Devices, keys and runs stay the same.

    \b
    Example:
      fedtune server init --hostname fedtune.lab.example --hostname 10.0.0.5 --listen 0.0.0.0:8443
    """
    from fedtune.server.operator_files import write_operator_file
    from fedtune.server.readdress import readdress
    from fedtune.server.server_home import create_server_home, exists
    from fedtune.tracking import Store

    if exists() and (names or listen):
        _show_new_address(readdress(list(names), listen))
        return
    made = create_server_home(list(names) or ["localhost"], listen or _LISTEN)
    with Store.open(made.settings.store) as store:
        write_operator_file(made, store.access, "local", made.operator_file)
    click.echo(f"created   {made.folder}")
    click.echo(f"settings  {made.folder / 'server.yaml'}")
    click.echo("try next  fedtune server up")


def _show_new_address(url: str) -> None:
    click.echo(f"the server uses {url} from its next start; its authority, keys, devices and runs stay the same")
    click.echo("run this on devices that use the old address:")
    click.echo(f"          fedtune device move {url}")
    click.echo("operators on other machines need a new file: fedtune server add-operator NAME -o FILE")
    click.echo("try next  fedtune server up")


@server.command()
def up() -> None:
    """Run the server until Ctrl-C.

    It continues submitted runs.

    Example: fedtune server up
    """
    click.echo("fedtune server: starting; press Ctrl-C to stop it", err=True)
    from fedtune.server.server_home import open_server_home
    from fedtune.server.server_process import run_server as serve

    serve(open_server_home())


@server.command()
@click.option("--user", help="User of the unit; not root.  [default: you]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("."), help="Folder to write to.")
def package(user: str | None, output: Path) -> None:
    """Write files to run this server as a service.

    The files are a systemd unit, a Dockerfile and a wheel of this fedtune.

    Example: fedtune server package -o deploy
    """
    from fedtune.server.deployment_files import write_deployment_files
    from fedtune.systemd_units import service_user

    for path in write_deployment_files(output, service_user(user)):
        click.echo(path)


@server.command()
@add_operator_file_option
@json_option
def runs(operator_file: Path | None, as_json: bool) -> None:
    """List submitted runs, newest first.

    To follow one, use fedtune runs watch RUN.

    Example: fedtune server runs --operator-file ada.json
    """
    with connect_to_server(operator_file) as connection:
        found = connection.request_json("GET", "runs")["runs"]
    print_rows(found, server_view.RUNS, as_json)


@server.command()
@click.argument("run", metavar="[RUN]", default="")
@click.option("-n", "--lines", type=click.IntRange(1, 5000), default=200, show_default=True, help="Newest lines.")
@add_operator_file_option
@json_option
def logs(run: str, lines: int, operator_file: Path | None, as_json: bool) -> None:
    """Show the newest log lines.

    Without RUN, these are the logs of the server and of Flower. With RUN, it is the log of the process that
    coordinates the run.

    \b
    Example:
      fedtune server logs
      fedtune server logs latest -n 50
    """
    from urllib.parse import quote

    from fedtune.json_text import json_text

    path = f"runs/{quote(run, safe='')}/logs" if run else "logs"
    with connect_to_server(operator_file) as connection:
        found = connection.request_json("GET", f"{path}?lines={lines}")
    if as_json or found["lines"]:
        click.echo(json_text(found) if as_json else clean_lines("\n".join(found["lines"]), _LONGEST_LOG))
    else:
        click.echo("the log is empty", err=True)
