"""Alembic, run on an open connection, so that an upgrade is one transaction."""

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from fedtune.errors import StoreError
from fedtune.shipped import shipped_folder

__all__ = ["make_alembic_config", "upgrade_schema"]


def make_alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for fedtune's migrations, on a connection that is already open."""
    config = Config()
    config.set_main_option("script_location", str(shipped_folder("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade_schema(connection: Connection, current: str | None, newest: str) -> None:
    """Bring a database at revision ``current`` to ``newest``; StoreError when this code does not know ``current``."""
    scripts = ScriptDirectory.from_config(make_alembic_config())
    if current not in {script.revision for script in scripts.walk_revisions()}:
        raise StoreError(
            f"the store is at revision {current}, but this fedtune knows it only up to {newest}; "
            "upgrade fedtune or choose another store"
        )
    command.upgrade(make_alembic_config(connection), "head")
