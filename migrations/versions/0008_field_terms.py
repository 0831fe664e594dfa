"""Tables and columns get the usual names. A client's device class and its device's name get a column each.

A table that gets a new name is made anew and filled, so that its constraints have the names of a new store's. All other
tables keep their rows in place: SQLite deletes what refers to a table together with it.
"""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "runs": {"created": "created_at", "finished": "finished_at"},
    "metrics": {"part": "split"},
    "client_scores": {"predictions": "num_predictions"},
    "devices": {
        "node": "node_id",
        "enrolled": "enrolled_at",
        "seen": "last_seen_at",
        "quarantined": "quarantine_reason",
    },
    "operators": {"sha256": "key_sha256", "created": "created_at"},
    "audit": {"at": "recorded_at", "kind": "outcome", "who": "actor", "what": "message", "last": "last_recorded_at"},
}
"""The old and the new names of columns, by table."""

_DEPLOYED = "run_id IN (SELECT run_id FROM seats)"
"""Only a run on real devices has seats. Its contributions name the device, those of a simulation its class."""


def upgrade() -> None:
    op.drop_index("ix_runs_created", "runs")
    for table, names in _RENAMED.items():
        for old, new in names.items():
            op.alter_column(table, old, new_column_name=new)
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.execute("UPDATE metrics SET split = 'local' WHERE split = 'own'")
    _create_client_records()
    _create_assignments()
    _create_enrolment_tokens()


def _create_client_records() -> None:
    op.create_table(
        "client_records",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("client", sa.Integer, nullable=False),
        sa.Column("device_class", sa.Text),
        sa.Column("device_name", sa.Text),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("num_examples", sa.BigInteger, nullable=False),
        sa.Column("bytes_down", sa.BigInteger, nullable=False),
        sa.Column("bytes_up", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double),
        sa.Column("activation_memory", sa.BigInteger, nullable=False),
        sa.Column("peak_memory", sa.BigInteger, nullable=False),
        sa.Column("update_norm", sa.Double),
        sa.Column("train_loss", sa.Double),
        sa.Column("staleness", sa.Integer),
        *_round_constraints("client_records"),
    )
    changed = {
        "device_class": f"CASE WHEN {_DEPLOYED} THEN NULL ELSE device END",
        "device_name": f"CASE WHEN {_DEPLOYED} THEN device END",
        "status": "CASE status WHEN 'refused' THEN 'rejected' ELSE status END",
        "num_examples": "examples",
        "activation_memory": "saved_bytes",
        "peak_memory": "peak_rss",
        "update_norm": "norm",
        "train_loss": "loss",
    }
    same = "run_id", "round", "client", "reason", "bytes_down", "bytes_up", "seconds", "staleness"
    _move_rows("contributions", "client_records", same, changed)


def _create_assignments() -> None:
    op.create_table(
        "assignments",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("client", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device_name", sa.String(64), nullable=False),
        sa.Column("node_id", sa.String(20), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "client", name="pk_assignments"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_assignments_runs", ondelete="CASCADE"),
    )
    _move_rows("seats", "assignments", ("run_id", "client"), {"device_name": "device", "node_id": "node"})


def _create_enrolment_tokens() -> None:
    op.create_table(
        "enrolment_tokens",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("device_name", sa.String(64)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True)),
        sa.Column("tags", sa.Text),
        sa.PrimaryKeyConstraint("sha256", name="pk_enrolment_tokens"),
    )
    changed = {
        "device_name": "NULLIF(device, '')",
        "created_at": "created",
        "expires_at": "expires",
        "used_at": "spent",
    }
    _move_rows("tokens", "enrolment_tokens", ("sha256", "tags"), changed)


def downgrade() -> None:
    _create_tokens()
    _create_seats()
    _create_contributions()
    op.execute("UPDATE metrics SET split = 'own' WHERE split = 'local'")
    op.drop_index("ix_runs_created_at", "runs")
    for table, names in _RENAMED.items():
        for old, new in names.items():
            op.alter_column(table, new, new_column_name=old)
    op.create_index("ix_runs_created", "runs", ["created"])


def _create_contributions() -> None:
    op.create_table(
        "contributions",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("client", sa.Integer, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("bytes_down", sa.BigInteger, nullable=False),
        sa.Column("bytes_up", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double),
        sa.Column("saved_bytes", sa.BigInteger, nullable=False),
        sa.Column("peak_rss", sa.BigInteger, nullable=False),
        sa.Column("norm", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("staleness", sa.Integer),
        *_round_constraints("contributions"),
    )
    changed = {
        "device": "COALESCE(device_name, device_class, '')",
        "status": "CASE status WHEN 'rejected' THEN 'refused' ELSE status END",
        "examples": "num_examples",
        "saved_bytes": "activation_memory",
        "peak_rss": "peak_memory",
        "norm": "update_norm",
        "loss": "train_loss",
    }
    same = "run_id", "round", "client", "reason", "bytes_down", "bytes_up", "seconds", "staleness"
    _move_rows("client_records", "contributions", same, changed)


def _create_seats() -> None:
    op.create_table(
        "seats",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("client", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("node", sa.String(20), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "client", name="pk_seats"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_seats_runs", ondelete="CASCADE"),
    )
    _move_rows("assignments", "seats", ("run_id", "client"), {"device": "device_name", "node": "node_id"})


def _create_tokens() -> None:
    op.create_table(
        "tokens",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=False),
        sa.Column("spent", sa.DateTime(timezone=True)),
        sa.Column("tags", sa.Text),
        sa.PrimaryKeyConstraint("sha256", name="pk_tokens"),
    )
    changed = {
        "device": "COALESCE(device_name, '')",
        "created": "created_at",
        "expires": "expires_at",
        "spent": "used_at",
    }
    _move_rows("enrolment_tokens", "tokens", ("sha256", "tags"), changed)


def _round_constraints(table: str) -> list[Any]:
    """The constraints of a table with one row per client and round."""
    return [
        sa.PrimaryKeyConstraint("run_id", "round", "client", name=f"pk_{table}"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"], ["rounds.run_id", "rounds.number"], name=f"fk_{table}_rounds", ondelete="CASCADE"
        ),
    ]


def _move_rows(old: str, new: str, same: tuple[str, ...], changed: Mapping[str, str]) -> None:
    """Fill table ``new`` from ``old`` and drop that: columns named the ``same``, then those from an expression."""
    values = {name: name for name in same} | {**changed}
    op.execute(f"INSERT INTO {new} ({', '.join(values)}) SELECT {', '.join(values.values())} FROM {old}")
    op.drop_table(old)
