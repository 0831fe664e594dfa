"""The connection of the command line to a server. An operator file holds its address, certificate and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import click

from fedtune import paths
from fedtune.errors import ServerError

__all__ = ["OperatorClient", "add_operator_file_option", "connect_to_server"]

Command = TypeVar("Command", bound=Callable[..., Any])


def add_operator_file_option(command: Command) -> Command:
    """Add the option --operator-file."""
    return click.option(
        "--operator-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        envvar=["FEDTUNE_OPERATOR_FILE", "FEDTUNE_SERVER"],
        help="Operator file, see fedtune server add-operator.  [default: that of the server on this machine]",
    )(command)


class OperatorClient:
    """An operator's connection to a server."""

    def __init__(self, url: str, ca: str, key: str) -> None:
        import ssl

        import httpx

        trust = ssl.create_default_context(cadata=ca)
        self.url = url
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=url, verify=trust, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def request_json(self, method: str, path: str, sent: Any = None, *, timeout_seconds: float = 60.0) -> Any:
        """Return the server's reply; ServerError if the server refuses or cannot be reached."""
        import httpx

        try:
            answer = self._client.request(method, f"/fedtune/{path}", json=sent, timeout=timeout_seconds)
        except httpx.HTTPError as error:
            raise ServerError(
                f"cannot reach the server at {self.url} ({error}); is fedtune server up there?"
            ) from error
        try:
            reply = answer.json()
        except ValueError as error:
            raise ServerError(f"{self.url} is not a fedtune server; check the address") from error
        if answer.is_error:
            raise ServerError(str(reply.get("error", f"the server replied with status {answer.status_code}")))
        return reply


def connect_to_server(file: Path | None) -> OperatorClient:
    """Connect to the server of an operator file, by default to the server on this machine."""
    path = file or paths.get_home_folder() / "server" / "operator.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        connection = OperatorClient(found["url"], found["ca"], found["key"])
    except FileNotFoundError as error:
        raise ServerError(
            f"there is no operator file {path}; name one with --operator-file or FEDTUNE_OPERATOR_FILE"
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ServerError(f"{path} is not an operator file; create one with fedtune server add-operator") from error
    return connection
