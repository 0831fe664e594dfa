"""Begin the next revision: compare a scratch database at head with ``fedtune.tracking.tables`` and write what differs.

Usage: ``python migrations/new_revision.py "what changes"``; then read the file and set
``fedtune.tracking.schema_version.HEAD`` to it. Released revisions are never edited.
"""

import sys

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from fedtune.tracking.schema_upgrade import make_alembic_config


def main(message: str) -> None:
    """Write ``versions/NNNN_message.py``, numbered after the newest revision."""
    with create_engine("sqlite://").connect() as connection:
        config = make_alembic_config(connection)
        command.upgrade(config, "head")
        head = ScriptDirectory.from_config(config).get_current_head() or "0000"
        command.revision(config, message, autogenerate=True, rev_id=f"{int(head) + 1:04d}")


if __name__ == "__main__":
    main(sys.argv[1])
