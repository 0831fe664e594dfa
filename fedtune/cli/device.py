"""``fedtune device``: enrol this machine as a device of a server, and take part in its runs."""

import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

__all__ = ["MemorySize", "device"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class MemorySize(click.ParamType[int]):
    """A number of bytes, such as 512MB or 2GiB. Without pydantic, which needs eight megabytes of a device's memory."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes. Click prints a usage error for anything else."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(value), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is not an amount of memory; write for example 512MB or 2GiB", param, ctx)
        size = int(float(found[1]) * _UNITS[(found[2] or "").upper()])
        if size < _UNITS["MB"]:
            self.fail(
                f"{value!r} is less than 1 MB, and a trainer needs some hundreds; write 512MB or 2GiB", param, ctx
            )
        return size


_data = click.option("--data", "source", metavar="SOURCE", required=True, help="csv:FILE, jsonl:FILE, parquet:FILE, "
                     "folder:PATH, sample:NAME, or partition:NUMBER, a partition of the recipe's data.")  # fmt: skip
_memory = click.option(
    "--memory", type=MemorySize(), metavar="SIZE", help="Memory limit of the trainer.  [default: all]"
)
_idle = click.option(
    "--trainer-idle-timeout",
    "idle_minutes",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Minutes after which an idle trainer process ends.",
)


@click.group()
def device() -> None:
    """Use this machine as a device. It trains on its own data, which never leaves it."""


@device.command()
@click.argument("url", required=False)
@click.option(
    "--token",
    envvar="FEDTUNE_TOKEN",
    default="-",
    show_default=True,
    help='Token from the operator; "-" reads it from a pipe or prompts for it.',
)
@click.option("--name", help="Name of this device on the server.  [default: name in the token, or host name]")
def enrol(url: str | None, token: str, name: str | None) -> None:
    """Enrol this machine as a device, with a one-time token. URL overrides the address in the token.

    Example: fedtune device enrol --token -
    """
    from fedtune.device.device_home import DeviceHome
    from fedtune.device.enrolment import EnrolmentToken, enrol_device

    text = _read_token() if token == "-" else token
    identity = enrol_device(DeviceHome(), url, EnrolmentToken.parse_token(text), name)
    click.echo(f"enrolled as {identity.name} at {identity.url}\ntry next  fedtune device join --data csv:FILE")


def _read_token() -> str:
    """Read one line from standard input. In a terminal, prompt for it without showing it."""
    if sys.stdin.isatty():
        return str(click.prompt("token", hide_input=True, err=True))
    return sys.stdin.readline()


@device.command()
@click.argument("url")
def move(url: str) -> None:
    """Change the address of the server. The key and the name of the device stay the same.

    Example: fedtune device move https://192.168.1.20:8443
    """
    from fedtune.device.device_home import DeviceHome
    from fedtune.device.enrolment import move_device

    identity = move_device(DeviceHome(), url)
    click.echo(f"{identity.name} reaches its server at {identity.url}\ntry next  fedtune device join --data csv:FILE")


@device.command()
@_data
@_memory
@_idle
@click.option(
    "--memory-key",
    envvar="FEDTUNE_MEMORY_KEY",
    type=click.Path(path_type=Path),
    help="File of 32 bytes that encrypts what is kept of earlier tasks, e.g. on a mounted keyring.  "
    "[default: a key of each run in the device's home]",
)
@click.option(
    "--memory-limit",
    "limit",
    type=click.Choice(["auto", "cgroup", "process"]),
    default="auto",
    show_default=True,
    help="What holds the trainer to --memory: a control group, or the device alone; auto takes a group where it may.",
)
def join(source: str, memory: int | None, idle_minutes: float, memory_key: Path | None, limit: str) -> None:
    """Take part in runs until you stop the command.

    The device reconnects after server restarts and network failures.

    \b
    Example:
      fedtune device join --data csv:reviews.csv --memory 512MB
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the device continues when its terminal closes
    import psutil

    from fedtune.device.device_home import DeviceHome
    from fedtune.device.join import TrainerSettings, run_device
    from fedtune.device.memory_key import use_memory_key

    if memory_key is not None:
        use_memory_key(memory_key)

    budget = memory or psutil.virtual_memory().total
    run_device(DeviceHome(), TrainerSettings(source, budget, idle_minutes * 60, limit), print_with_time)


def print_with_time(sentence: str) -> None:
    from datetime import datetime

    with suppress(OSError):  # the terminal may be gone
        click.echo(f"{datetime.now():%H:%M:%S} {sentence}", err=True)


@device.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def status(as_json: bool) -> None:
    """Show the identity and the state of this device; exit code 1 if it is not joined.

    Example: fedtune device status
    """
    from fedtune.device.device_home import DeviceHome
    from fedtune.device.enrolment import authority_ends
    from fedtune.json_text import json_text

    home = DeviceHome()
    identity, joined = home.read_identity(), home.is_joined
    noted = home.read_status() if joined else {"state": "not joined"}
    ends = f"{authority_ends(identity):%Y-%m-%d}"
    found = {"name": identity.name, "server": identity.url, "node": identity.node, "enrolled until": ends, **noted}
    shown = [f"{key:14}  {value}" for key, value in found.items() if value is not None]
    click.echo(json_text(found) if as_json else "\n".join(shown))
    if not joined:
        raise click.exceptions.Exit(1)


@device.command()
@click.argument("run")
def forget(run: str) -> None:
    """Delete what this device keeps of a run, the key first. It starts anew if it takes part again.

    RUN is the whole id of the run, which the operator knows.

    Example: fedtune device forget 20260301-120000-sentiment-1a2b
    """
    from fedtune.device.device_home import DeviceHome
    from fedtune.errors import DeviceError

    home = DeviceHome()
    if home.is_joined:
        raise DeviceError(f"the device in {home.folder} is joined; stop that process first")
    home.delete_run(run)
    click.echo(f"forgot {run}")


@device.command()
def leave() -> None:
    """Delete the identity, all keys, what is kept of runs and the current train request.

    The operator removes the device from the server.

    Example: fedtune device leave
    """
    from fedtune.device.device_home import DeviceHome
    from fedtune.errors import DeviceError

    home = DeviceHome()
    if not home.is_enrolled:
        raise DeviceError(f"{home.folder} contains no enrolled device, so there is nothing to delete")
    if home.is_joined:
        raise DeviceError(f"the device in {home.folder} is joined; stop that process first")
    home.delete_all()
    click.echo("left; ask the operator to remove this device from the server too")


@device.command()
@_data
@_memory
@click.option("--user", help="User of the systemd unit; not root.  [default: you]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("."), help="Folder to write to.")
def package(source: str, memory: int | None, user: str | None, output: Path) -> None:
    """Write a systemd unit, a Dockerfile and a minimal install with a wheel of this fedtune.

    Example: fedtune device package --data csv:/data/reviews.csv --memory 512MB -o deploy
    """
    from fedtune.device.deployment_files import write_deployment_files
    from fedtune.systemd_units import service_user

    for path in write_deployment_files(output, source, memory, service_user(user)):
        click.echo(path)
