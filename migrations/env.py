"""Run by Alembic for each command, on the open connection ``fedtune.tracking.schema_upgrade.settings`` hands in."""

from alembic import context

from fedtune.tracking.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
