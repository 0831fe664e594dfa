"""The tables of the newest schema. Deleting a run deletes its rows; a server's tables belong to no run."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from fedtune.tracking.column_types import AnyText, Flag, Measured, Names, Utc, Words

__all__ = [
    "ROUND_CHILD_TABLES",
    "assignments",
    "audit",
    "checkpoints",
    "client_records",
    "client_scores",
    "devices",
    "enrolment_tokens",
    "metadata",
    "metrics",
    "operators",
    "rounds",
    "runs",
    "samples",
    "task_scores",
    "tasks",
]


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _of_round() -> list[Column[Any] | ForeignKeyConstraint]:
    """Return the key columns of a table whose rows belong to one round."""
    return [
        Column("run_id", String(64), primary_key=True),
        Column("round", Integer, primary_key=True),
        ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.number"], ondelete="CASCADE"),
    ]


runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("engine", String(32), nullable=False),
    Column("created_at", Utc, nullable=False, index=True),
    Column("finished_at", Utc),
    Column("rounds_planned", Integer, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("status", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("seconds", Measured),
    Column("device_type", String(16)),
    ForeignKeyConstraint(["run_id"], ["runs.id"], ondelete="CASCADE"),
)

client_records = Table(
    "client_records",
    metadata,
    *_of_round(),
    Column("client", Integer, primary_key=True),
    Column("device_class", Text),
    Column("device_name", Text),
    Column("status", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("num_examples", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("seconds", Measured),
    Column("activation_memory", BigInteger, nullable=False),
    Column("peak_memory", BigInteger, nullable=False),
    Column("update_norm", Measured),
    Column("train_loss", Measured),
    Column("staleness", Integer),
    Column("device_type", String(16)),
    Column("accelerator_memory", BigInteger),
    Column("accelerator_reserved", BigInteger),
    Column("stored_bytes", BigInteger),
    Column("anonymous_memory", BigInteger),
    Column("file_memory", BigInteger),
    Column("predicted_anonymous", BigInteger),
    Column("predicted_total", BigInteger),
)

metrics = Table(
    "metrics",
    metadata,
    *_of_round(),
    Column("split", String(16), primary_key=True),
    Column("domain", String(255), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("value", Measured),
    Column("device_type", String(16)),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    *_of_round(),
    Column("path", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("pruned", Flag),
    Column("memory_sha256", String(64)),
    Column("memory_bytes", BigInteger),
)

client_scores = Table(
    "client_scores",
    metadata,
    *_of_round(),
    Column("client", Integer, primary_key=True),
    Column("moment", String(8), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("value", Measured),
    Column("num_predictions", BigInteger, nullable=False),
    Column("device_type", String(16)),
)

samples = Table(
    "samples",
    metadata,
    *_of_round(),
    Column("number", Integer, primary_key=True),
    Column("prompt", AnyText, nullable=False),
    Column("text", AnyText, nullable=False),
    Column("ended", Flag),
)

task_scores = Table(
    "task_scores",
    metadata,
    *_of_round(),
    Column("scope", String(64), primary_key=True),
    Column("moment", String(8), primary_key=True),
    Column("task", String(255), primary_key=True),
    Column("num_predictions", BigInteger, nullable=False),
    Column("accuracy", Measured),
    Column("loss", Measured),
    Column("device_type", String(16)),
)

ROUND_CHILD_TABLES = (client_records, metrics, checkpoints, client_scores, samples, task_scores)

tasks = Table(
    "tasks",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("visit", Integer, primary_key=True, autoincrement=False),
    Column("name", String(255), nullable=False),
    Column("first_round", Integer, nullable=False),
    Column("last_round", Integer),
    Column("opened_by", String(16), nullable=False),
    Column("labels", Names),
    Column("test_examples", BigInteger),
    ForeignKeyConstraint(["run_id", "first_round"], ["rounds.run_id", "rounds.number"], ondelete="CASCADE"),
)

assignments = Table(
    "assignments",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("client", Integer, primary_key=True, autoincrement=False),
    Column("device_name", String(64), nullable=False),
    Column("node_id", String(20), nullable=False),
    ForeignKeyConstraint(["run_id"], ["runs.id"], ondelete="CASCADE"),
)

devices = Table(
    "devices",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("node_id", String(20), nullable=False),
    Column("public_key", Text, nullable=False),
    Column("enrolled_at", Utc, nullable=False),
    Column("last_seen_at", Utc),
    Column("profile", Text, nullable=False),
    Column("tags", Words),
    Column("quarantine_reason", Text),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("device_name", String(64)),
    Column("created_at", Utc, nullable=False),
    Column("expires_at", Utc, nullable=False),
    Column("used_at", Utc),
    Column("tags", Words),
)

operators = Table(
    "operators",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("key_sha256", String(64), nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("role", String(16)),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("recorded_at", Utc, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("message", Text, nullable=False),
    Column("source", String(128), index=True),
    Column("times", Integer),
    Column("last_recorded_at", Utc),
)
