"""``fedtune server operator, operators, tokens, audit``: access rights, and the log of requests."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click

from fedtune.cli import server_view
from fedtune.cli.operator_client import OperatorClient, add_operator_file_option, connect_to_server
from fedtune.cli.server_view import json_option, print_rows

__all__ = ["audit", "operator", "operators", "tokens"]

_ROLES = ("read", "submit", "admin")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_PAGE, _LARGEST_PAGE = 100, 1000


@click.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to give to the operator.")
@click.option(
    "--role", type=click.Choice(_ROLES), default="admin", show_default=True, help="Permissions of the operator."
)
def operator(name: str, output: Path, role: str) -> None:
    """Write an operator file. Its holder can submit runs and enrol devices, as the role allows.

    A new file makes the earlier file of this operator invalid.

    Whoever holds the file may look at everything with the role read, also submit, stop and resume runs with submit,
    and also let devices and operators in and out with admin.

    Example: fedtune server operator ada -o ada.json --role submit
    """
    from fedtune.server.operator_files import write_operator_file
    from fedtune.server.server_home import open_server_home
    from fedtune.tracking import Store

    place = open_server_home()
    with Store.open(place.settings.store) as store:
        write_operator_file(place, store.access, name, output, role)
    click.echo(f"written: {output}; treat it like a password")


@click.command()
@click.option("--remove", "removed", multiple=True, metavar="NAME", help="Revoke the key of an operator first.")
@add_operator_file_option
@json_option
def operators(removed: tuple[str, ...], server: Path | None, as_json: bool) -> None:
    """List operators and their roles.

    \b
    Example:
      fedtune server operators
      fedtune server operators --remove ada
    """
    with connect_to_server(server) as connection:
        for name in removed:
            connection.request_json("DELETE", f"operators/{quote(name, safe='')}")
        found = connection.request_json("GET", "operators")["operators"]
    print_rows(found, server_view.OPERATORS, as_json)


@click.command()
@click.option("--remove", "removed", multiple=True, metavar="TOKEN", help="Revoke a token first.")
@add_operator_file_option
@json_option
def tokens(removed: tuple[str, ...], server: Path | None, as_json: bool) -> None:
    """List unused tokens. Each is named by the first characters of its hash.

    \b
    Example:
      fedtune server tokens
      fedtune server tokens --remove 3f9c21d0a4be
    """
    with connect_to_server(server) as connection:
        for token in removed:
            connection.request_json("DELETE", f"tokens/{quote(token, safe='')}")
        found = connection.request_json("GET", "tokens")["tokens"]
    print_rows(found, server_view.TOKENS, as_json)


@click.command()
@click.option("--since", metavar="TIME", help="30m, 12h, 7d, or a date such as 2026-05-04 or 2026-05-04T12:00.")
@click.option(
    "--limit", type=click.IntRange(1, _LARGEST_PAGE), default=_PAGE, show_default=True, help="Number of lines."
)
@click.option("--before", type=click.IntRange(1), metavar="LINE", help="Show lines older than this line number.")
@click.option("--all", "every", is_flag=True, help="Show all lines.")
@add_operator_file_option
@json_option
def audit(since: str | None, limit: int, before: int | None, every: bool, server: Path | None, as_json: bool) -> None:
    """List refused and accepted requests, newest first.

    \b
    Example:
      fedtune server audit
      fedtune server audit --since 12h --all
    """
    with connect_to_server(server) as connection:
        found, more = _page(connection, since, _LARGEST_PAGE if every else limit, before)
        while every and more:
            lines, more = _page(connection, since, _LARGEST_PAGE, found[-1]["id"])
            found += lines
    print_rows(found, server_view.AUDIT, as_json)
    if more:
        click.echo(f"older lines: fedtune server audit --before {found[-1]['id']}, or --all", err=True)


def _page(connection: OperatorClient, since: str | None, limit: int, before: int | None) -> tuple[list[Any], bool]:
    asked = {"limit": limit, "since": _moment(since) if since else None, "before": before}
    query = urlencode({key: value for key, value in asked.items() if value is not None})
    told = connection.request_json("GET", f"audit?{query}")
    return told["audit"], told.get("more", False)


def _moment(text: str) -> str:
    """A time as the server reads it; what has no zone is this machine's time."""
    if found := re.fullmatch(r"(\d{1,4})([mhd])", text, re.ASCII):
        return (datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})).isoformat()
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no time; write e.g. 12h or 2026-05-04T12:00", param_hint="--since"
        ) from error
