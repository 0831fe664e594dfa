"""``fedtune server add-operator, operators, tokens, audit ...``: access rights, and the log of requests."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click

from fedtune.cli import server_view
from fedtune.cli.operator_client import OperatorClient, add_operator_file_option, connect_to_server
from fedtune.cli.server_view import json_option, print_rows

__all__ = ["add_operator", "audit", "operators", "remove_operator", "remove_token", "tokens"]

_ROLES = ("read", "submit", "admin")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_PAGE, _LARGEST_PAGE = 100, 1000


@click.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to give to the operator.")
@click.option("--role", type=click.Choice(_ROLES), default="admin", show_default=True, help="What the operator may do.")
def add_operator(name: str, output: Path, role: str) -> None:
    """Write an operator file.

    A new file makes the earlier file of this operator invalid.

    The role read allows listing everything. The role submit also allows submitting, stopping and resuming runs. The
    role admin also allows adding and removing devices, tokens and operators.

    Example: fedtune server add-operator ada -o ada.json --role submit
    """
    from fedtune.server.operator_files import write_operator_file
    from fedtune.server.server_home import open_server_home
    from fedtune.tracking import Store

    place = open_server_home()
    with Store.open(place.settings.store) as store:
        write_operator_file(place, store.access, name, output, role)
    click.echo(f"written: {output}; treat it like a password")


@click.command()
@click.option("--remove", "removed", multiple=True, hidden=True)
@add_operator_file_option
@json_option
def operators(removed: tuple[str, ...], operator_file: Path | None, as_json: bool) -> None:
    """List operators and their roles.

    Example: fedtune server operators
    """
    with connect_to_server(operator_file) as connection:
        for name in removed:
            _delete(connection, "operators", name)
        found = connection.request_json("GET", "operators")["operators"]
    print_rows(found, server_view.OPERATORS, as_json)


@click.command()
@click.argument("name")
@add_operator_file_option
def remove_operator(name: str, operator_file: Path | None) -> None:
    """Remove an operator.

    The key in its file is no longer valid.

    Example: fedtune server remove-operator ada
    """
    with connect_to_server(operator_file) as connection:
        click.echo(f"removed: {_delete(connection, 'operators', name)['operator']}")


@click.command()
@click.option("--remove", "removed", multiple=True, hidden=True)
@add_operator_file_option
@json_option
def tokens(removed: tuple[str, ...], operator_file: Path | None, as_json: bool) -> None:
    """List unused tokens.

    Each is named by the first characters of its hash.

    Example: fedtune server tokens
    """
    with connect_to_server(operator_file) as connection:
        for token in removed:
            _delete(connection, "tokens", token)
        found = connection.request_json("GET", "tokens")["tokens"]
    print_rows(found, server_view.TOKENS, as_json)


@click.command()
@click.argument("token")
@add_operator_file_option
def remove_token(token: str, operator_file: Path | None) -> None:
    """Remove an unused token.

    TOKEN is its name in fedtune server tokens, or the beginning of it.

    Example: fedtune server remove-token 3f9c21d0a4be
    """
    with connect_to_server(operator_file) as connection:
        click.echo(f"removed: {_delete(connection, 'tokens', token)['token']}")


def _delete(connection: OperatorClient, kind: str, name: str) -> dict[str, Any]:
    deleted: dict[str, Any] = connection.request_json("DELETE", f"{kind}/{quote(name, safe='')}")
    return deleted


@click.command()
@click.option("--since", metavar="TIME", help="30m, 12h, 7d, or a date such as 2026-05-04 or 2026-05-04T12:00.")
@click.option(
    "--limit", type=click.IntRange(1, _LARGEST_PAGE), default=_PAGE, show_default=True, help="Number of lines."
)
@click.option("--before", type=click.IntRange(1), metavar="LINE", help="Show lines older than this line number.")
@click.option("--all", "every", is_flag=True, help="Show all lines.")
@add_operator_file_option
@json_option
def audit(
    since: str | None, limit: int, before: int | None, every: bool, operator_file: Path | None, as_json: bool
) -> None:
    """List refused and accepted requests, newest first.

    \b
    Example:
      fedtune server audit
      fedtune server audit --since 12h --all
    """
    with connect_to_server(operator_file) as connection:
        found, more = _read_page(connection, since, _LARGEST_PAGE if every else limit, before)
        while every and more:
            lines, more = _read_page(connection, since, _LARGEST_PAGE, found[-1]["id"])
            found += lines
    print_rows(found, server_view.AUDIT, as_json)
    if more:
        click.echo(f"older lines: fedtune server audit --before {found[-1]['id']}, or --all", err=True)


def _read_page(connection: OperatorClient, since: str | None, limit: int, before: int | None) -> tuple[list[Any], bool]:
    filters = {"limit": limit, "since": _parse_time(since) if since else None, "before": before}
    query = urlencode({key: value for key, value in filters.items() if value is not None})
    reply = connection.request_json("GET", f"audit?{query}")
    return reply["audit"], reply.get("more", False)


def _parse_time(text: str) -> str:
    """Return the time in ISO format. A time without a zone is local time."""
    if found := re.fullmatch(r"(\d{1,4})([mhd])", text, re.ASCII):
        return (datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})).isoformat()
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is not a time; write e.g. 12h or 2026-05-04T12:00", param_hint="--since"
        ) from error
