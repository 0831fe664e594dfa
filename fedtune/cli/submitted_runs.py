"""The commands of ``fedtune runs`` that ask a server: follow, stop and resume what was submitted to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fedtune.cli.operator_client import add_operator_file_option, connect_to_server
from fedtune.json_text import json_text

__all__ = ["resume", "stop", "watch"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _shared(command: Command) -> Command:
    """The argument and the options of every command here."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")(command)
    return click.argument("run", metavar="RUN", default="latest")(add_operator_file_option(command))


@click.command()
@_shared
def watch(run: str, server: Path | None, as_json: bool) -> None:
    """Follow a submitted run to its end. Ctrl-C stops the display, not the run.

    Example: fedtune runs watch latest
    """
    from fedtune.cli.follow_run import follow_run

    with connect_to_server(server) as connection:
        last = follow_run(connection, run, quiet=as_json)
        if as_json:
            click.echo(json_text(connection.request_json("GET", f"runs/{last['id']}")))


@click.command()
@_shared
def stop(run: str, server: Path | None, as_json: bool) -> None:
    """Stop a submitted run. Completed rounds are kept.

    Example: fedtune runs stop latest
    """
    with connect_to_server(server) as connection:
        told = connection.request_json("POST", f"runs/{run}/stop")
    click.echo(json_text(told) if as_json else f"stopped: {told['run']}")


@click.command()
@_shared
def resume(run: str, server: Path | None, as_json: bool) -> None:
    """Resume a submitted run that was stopped or failed, at its next round.

    Example: fedtune runs resume latest
    """
    with connect_to_server(server) as connection:
        told = connection.request_json("POST", f"runs/{run}/resume")
    click.echo(json_text(told) if as_json else f"queued: {told['run']}")
