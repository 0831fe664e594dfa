"""``fedtune device``: make this machine a server's device, and keep it one."""

import re
import signal
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["device"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Bytes(click.ParamType[int]):
    """A number of bytes, such as 512MB or 2GiB; by hand, since pydantic alone would cost a device eight megabytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(value), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no amount of memory; write 512MB or 2GiB", param, ctx)
        return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


_data = click.option("--data", "source", metavar="SOURCE", required=True, help="csv:FILE, jsonl:FILE, parquet:FILE, "
                     "folder:PATH, sample:NAME, or part:NUMBER of the recipe's own split.")  # fmt: skip
_memory = click.option("--memory", type=_Bytes(), metavar="SIZE", help="Most the trainer may hold.  [default: all]")
_idle = click.option(
    "--idle", type=click.FloatRange(0), default=30.0, show_default=True, help="Minutes a trainer rests before it ends."
)


@click.group()
def device() -> None:
    """This machine as a device: it keeps its data and its key, and trains what its server's recipes ask."""


@device.command()
@click.argument("url", required=False)
@click.option("--token", envvar="FEDTUNE_TOKEN", required=True, help='From the operator; "-" reads it from a pipe.')
@click.option("--name", help="What the server calls this device.  [default: the host's name, or the token's]")
def enroll(url: str | None, token: str, name: str | None) -> None:
    """Become a device of the server at URL, once, with a one-time token.

    Example: fedtune device enroll https://server:8443 --token TOKEN
    """
    from clients.device_home import DeviceHome
    from clients.enrolment import Token, enrol_device

    text = sys.stdin.readline() if token == "-" else token
    identity = enrol_device(DeviceHome(), url, Token.read(text), name)
    click.echo(f"enrolled as {identity.name} at {identity.url}\ntry next  fedtune device join --data csv:FILE")


@device.command()
@_data
@_memory
@_idle
def join(source: str, memory: int | None, idle: float) -> None:
    """Take part until stopped, through whatever happens to the server or the line.

    \b
    Example:
      fedtune device join --data csv:reviews.csv --memory 512MB
    """
    import psutil

    from clients.device_home import DeviceHome
    from clients.join import join as take_part

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    take_part(DeviceHome(), source, memory or psutil.virtual_memory().total, idle * 60, _say)


def _say(sentence: str) -> None:
    from datetime import datetime

    click.echo(f"{datetime.now():%H:%M:%S} {sentence}", err=True)


@device.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def status(as_json: bool) -> None:
    """Who this device is, and what it is doing.

    Example: fedtune device status
    """
    from clients.device_home import DeviceHome
    from fedtune.json_text import json_text

    home = DeviceHome()
    identity = home.identity()
    noted = home.noted() if home.joined else {"state": "not joined"}
    found = {"name": identity.name, "server": identity.url, "node": identity.node, **noted}
    shown = [f"{key:8}  {value}" for key, value in found.items() if value is not None]
    click.echo(json_text(found) if as_json else "\n".join(shown))


@device.command()
def leave() -> None:
    """Forget the server, the key and the order in hand; the operator removes the device at the server.

    Example: fedtune device leave
    """
    from clients.device_home import DeviceHome
    from fedtune.errors import DeviceError

    home = DeviceHome()
    if not home.enrolled:
        raise DeviceError(f"{home.folder} holds no device; there is nothing to leave")
    if home.joined:
        raise DeviceError(f"the device in {home.folder} is joined; stop that process first")
    home.forget()
    click.echo("left; ask the operator to remove this device at the server too")


@device.command()
@_data
@_memory
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("."), help="Folder to write to.")
def package(source: str, memory: int | None, output: Path) -> None:
    """Write a systemd unit and a Dockerfile that keep this device joined, and the requirements of a thin install.

    Example: fedtune device package --data csv:/data/reviews.csv --memory 512MB -o deploy
    """
    from clients.package import package as write_files

    options = ["--data", source, *(["--memory", f"{memory}"] if memory else [])]
    for path in write_files(output, options):
        click.echo(path)
