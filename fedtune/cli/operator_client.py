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
    """The option that names an operator's file."""
    return click.option(
        "--server",
        type=click.Path(path_type=Path),
        metavar="FILE",
        envvar="FEDTUNE_SERVER",
        help="Operator file, see fedtune server operator.  [default: that of the server on this machine]",
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
        """The JSON a server answers; ServerError with its sentence when it refuses, or when it cannot be reached."""
        import httpx

        try:
            answer = self._client.request(method, f"/fedtune/{path}", json=sent, timeout=timeout_seconds)
        except httpx.HTTPError as error:
            raise ServerError(
                f"cannot reach the server at {self.url} ({error}); is fedtune server up there?"
            ) from error
        try:
            told = answer.json()
        except ValueError as error:
            raise ServerError(f"{self.url} is not a fedtune server; check the address") from error
        if answer.is_error:
            raise ServerError(str(told.get("error", f"the server answered {answer.status_code}")))
        return told


def connect_to_server(file: Path | None) -> OperatorClient:
    """The server an operator's file names, by default the one of this machine."""
    path = file or paths.get_home_folder() / "server" / "operator.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        connection = OperatorClient(told["url"], told["ca"], told["key"])
    except FileNotFoundError as error:
        raise ServerError(f"there is no operator file {path}; name one with --server or FEDTUNE_SERVER") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ServerError(f"{path} is not an operator file; create one with fedtune server operator") from error
    return connection
