"""Alembic, run on an open connection, so that an upgrade is one transaction."""

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from fedtune.errors import StoreError
from fedtune.shipped import shipped_folder
from fedtune.tracking import schema

__all__ = ["make_alembic_config", "upgrade_schema"]


def make_alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for fedtune's migrations, on a connection that is already open."""
    config = Config()
    config.set_main_option("script_location", str(shipped_folder("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade_schema(connection: Connection) -> None:
    """Bring a database to the newest revision; StoreError when it is at one this code does not know."""
    current = schema.read_revision(connection)
    if current not in {
        script.revision for script in ScriptDirectory.from_config(make_alembic_config()).walk_revisions()
    }:
        raise StoreError(
            f"the store is at revision {current}, but this fedtune knows it only up to {schema.HEAD_REVISION}; "
            "upgrade fedtune or choose another store"
        )
    command.upgrade(make_alembic_config(connection), "head")
