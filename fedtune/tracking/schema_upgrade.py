"""Upgrades by Alembic on an open connection, so that an upgrade is one transaction."""

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from fedtune.errors import StoreError
from fedtune.shipped import shipped_folder
from fedtune.tracking.run_lock import is_run_active

__all__ = ["make_alembic_config", "upgrade_schema"]


def make_alembic_config(connection: Connection | None = None) -> Config:
    """Configure Alembic for fedtune's migrations on a connection that is already open."""
    config = Config()
    config.set_main_option("script_location", str(shipped_folder("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade_schema(connection: Connection, current: str | None, newest: str) -> None:
    """Upgrade a database from revision ``current`` to ``newest``.

    StoreError when this code does not know ``current``, or when an older fedtune still writes to the database.
    """
    scripts = ScriptDirectory.from_config(make_alembic_config())
    if current not in {script.revision for script in scripts.walk_revisions()}:
        raise StoreError(
            f"the store is at revision {current}, but this fedtune knows it only up to {newest}; "
            "upgrade fedtune or choose another store"
        )
    _require_no_active_run(connection)
    command.upgrade(make_alembic_config(connection), "head")


def _require_no_active_run(connection: Connection) -> None:
    """A run that is executed now began with older code, which would find its tables no more."""
    running = connection.execute(text("SELECT id FROM runs WHERE status = 'running'")).scalars().all()
    if active := [run for run in running if is_run_active(run)]:
        raise StoreError(
            f"the store cannot be upgraded while an older fedtune executes run {active[0]}; wait for it or stop it"
        )
