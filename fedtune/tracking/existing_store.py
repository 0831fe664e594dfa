"""Opening a store that must be there. Commands that only read runs make no empty database."""

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from fedtune.errors import StoreError
from fedtune.tracking.database import get_default_url, get_sqlite_path
from fedtune.tracking.store import Store

__all__ = ["open_existing_store"]


def open_existing_store(url: str | None = None) -> Store:
    """Open the store at a SQLAlchemy URL, or at the default one; StoreError if its file does not exist.

    As in all commands, a store of an older schema is upgraded, and one of a newer schema is refused.
    """
    chosen = url or get_default_url()
    _require_file(chosen)
    return Store.open(chosen)


def _require_file(url: str) -> None:
    try:
        path = get_sqlite_path(make_url(url))
    except (ArgumentError, ValueError):
        return  # Store.open says what is wrong with it
    if path is not None and not path.is_file():
        raise StoreError(
            f"there is no run store at {path}; start a first run with fedtune simulate RECIPE, "
            "or name another store with --store"
        )
