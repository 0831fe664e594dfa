"""``fedtune server create-token, devices, tag, release, remove-device``: who takes part in the runs of a server."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import click

from fedtune.cli import server_view
from fedtune.cli.operator_client import OperatorClient, add_operator_file_option, connect_to_server
from fedtune.cli.server_view import json_option, print_rows

__all__ = ["create_token", "devices", "release", "remove_device", "tag"]

TagPairs = tuple[tuple[str, str], ...]


@click.command()
@click.argument("name", metavar="[DEVICE]", default="")
@click.option(
    "--valid-hours",
    type=click.FloatRange(0, min_open=True),
    default=24.0,
    show_default=True,
    help="Hours until the token expires.",
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag of the device; recipes select devices by tags.")
@add_operator_file_option
def create_token(name: str, valid_hours: float, tags: tuple[str, ...], operator_file: Path | None) -> None:
    """Print a token with which one device enrols.

    The token works once. Without DEVICE, the device chooses its name.

    Example: fedtune server create-token kitchen-pi --tag indoors
    """
    with connect_to_server(operator_file) as connection:
        sent = {"name": name, "hours": valid_hours, "tags": tags}
        click.echo(connection.request_json("POST", "tokens", sent)["token"])


@click.command()
@click.option("--tag", "added", nargs=2, multiple=True, hidden=True)
@click.option("--untag", "removed", nargs=2, multiple=True, hidden=True)
@add_operator_file_option
@json_option
def devices(added: TagPairs, removed: TagPairs, operator_file: Path | None, as_json: bool) -> None:
    """List enrolled devices with their state and their tags.

    Example: fedtune server devices
    """
    with connect_to_server(operator_file) as connection:
        for device, one in added:
            _change_tags(connection, device, [one], [])
        for device, one in removed:
            _change_tags(connection, device, [], [one])
        found = connection.request_json("GET", "devices")["devices"]
    print_rows(found, server_view.DEVICES, as_json)


@click.command()
@click.argument("device")
@click.option("--add", "added", multiple=True, metavar="TAG", help="Tag to add.")
@click.option("--remove", "removed", multiple=True, metavar="TAG", help="Tag to remove.")
@add_operator_file_option
def tag(device: str, added: tuple[str, ...], removed: tuple[str, ...], operator_file: Path | None) -> None:
    """Add tags to a device, or remove tags from it.

    Recipes select devices by tags.

    Example: fedtune server tag kitchen-pi --add indoors --remove attic
    """
    if not (added or removed):
        raise click.UsageError("name a tag with --add or --remove, e.g. --add indoors")
    with connect_to_server(operator_file) as connection:
        tags = _change_tags(connection, device, added, removed)
    click.echo(f"tags of {device}: {', '.join(tags) or 'none'}")


def _change_tags(connection: OperatorClient, device: str, added: Sequence[str], removed: Sequence[str]) -> list[str]:
    """Return the tags that the device has now."""
    path = f"devices/{quote(device, safe='')}/tags"
    tags: list[str] = connection.request_json("POST", path, {"add": list(added), "remove": list(removed)})["tags"]
    return tags


@click.command()
@click.argument("device")
@add_operator_file_option
def release(device: str, operator_file: Path | None) -> None:
    """Release a device from quarantine.

    fedtune server devices shows why it was quarantined.

    Example: fedtune server release kitchen-pi
    """
    with connect_to_server(operator_file) as connection:
        released = connection.request_json("POST", f"devices/{device}/release")["released"]
    click.echo(f"released: {device}" if released else f"{device} was not quarantined")


@click.command()
@click.argument("device")
@add_operator_file_option
def remove_device(device: str, operator_file: Path | None) -> None:
    """Remove a device.

    Its key is no longer valid.

    Example: fedtune server remove-device kitchen-pi
    """
    with connect_to_server(operator_file) as connection:
        removed = connection.request_json("DELETE", f"devices/{device}")["device"]
    click.echo(f"removed: {removed}; the next device that enrols under this name takes its place in runs")
