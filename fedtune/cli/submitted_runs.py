"""``fedtune runs watch, stop, resume``: commands for runs on a server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fedtune.cli.operator_client import add_operator_file_option, connect_to_server
from fedtune.json_text import json_text

__all__ = ["resume", "stop", "watch"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _add_shared_options(command: Command) -> Command:
    """Add the argument and the options that all these commands have."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")(command)
    return click.argument("run", metavar="RUN", default="latest")(add_operator_file_option(command))


@click.command()
@_add_shared_options
def watch(run: str, operator_file: Path | None, as_json: bool) -> None:
    """Follow a submitted run to its end. Ctrl-C stops the display, not the run.

    Example: fedtune runs watch latest
    """
    from fedtune.cli.follow_run import follow_run

    with connect_to_server(operator_file) as connection:
        last = follow_run(connection, run, quiet=as_json)
        if as_json:
            click.echo(json_text(connection.request_json("GET", f"runs/{last['id']}")))


@click.command()
@_add_shared_options
def stop(run: str, operator_file: Path | None, as_json: bool) -> None:
    """Stop a submitted run. Completed rounds are kept.

    Example: fedtune runs stop latest
    """
    with connect_to_server(operator_file) as connection:
        reply = connection.request_json("POST", f"runs/{run}/stop")
    click.echo(json_text(reply) if as_json else f"stopped: {reply['run']}")


@click.command()
@_add_shared_options
def resume(run: str, operator_file: Path | None, as_json: bool) -> None:
    """Resume a submitted run that was stopped or failed, at its next round.

    Example: fedtune runs resume latest
    """
    with connect_to_server(operator_file) as connection:
        reply = connection.request_json("POST", f"runs/{run}/resume")
    click.echo(json_text(reply) if as_json else f"queued: {reply['run']}")
