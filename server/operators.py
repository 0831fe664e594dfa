"""Operators' files: where the server is, its authority, and a key that only the file holds."""

from pathlib import Path

from fedtune.files import write
from fedtune.tracking import Access
from server.home import ServerHome
from server.secret import digest, new_secret

__all__ = ["add"]


def add(place: ServerHome, access: Access, name: str, output: Path) -> None:
    """Write an operator's file, readable by its owner only; an earlier key of that name is worthless then."""
    key = new_secret()
    write(output, place.connection(key))
    access.set_operator(name, digest(key))
