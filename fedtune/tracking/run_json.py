"""Runs as JSON documents, with the stable schema that docs/runs-schema.md describes."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedtune import paths
from fedtune.json_text import json_text
from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking.client_spread import compute_spreads
from fedtune.tracking.prediction_summary import summarise_predictions
from fedtune.tracking.records import CheckpointRecord, RoundRecord, RunRecord
from fedtune.tracking.run_summary import get_privacy_spent
from fedtune.tracking.stream_json import make_stream_document

__all__ = ["SCHEMA_VERSION", "json_text", "make_run_document"]

SCHEMA_VERSION = 2
"""The major version of the documents. Version 1 had no key for it."""


def make_run_document(run: RunRecord, rounds: Sequence[RoundRecord], *, detailed: bool = False) -> dict[str, Any]:
    """Describe a run with its metrics and newest checkpoint. ``detailed`` adds spent privacy, clients and rounds."""
    checkpoints = [_checkpoint(record.number, record.checkpoint) for record in rounds if record.checkpoint]
    found = (
        {"schema_version": SCHEMA_VERSION}
        | asdict(run)
        | {
            "recipe": read_stored_recipe(run.recipe),
            "created_at": run.created_at.isoformat(),
            "finished_at": run.finished_at.isoformat() if run.finished_at else None,
            "metrics": [{"round": record.number} | asdict(metric) for record in rounds for metric in record.metrics],
            "checkpoint": checkpoints[-1] if checkpoints else None,
            "stream": make_stream_document(run, rounds, detailed=detailed),
        }
    )
    if not detailed:
        return found
    clients = [asdict(one) for one in compute_spreads(rounds)]
    return found | {
        "privacy": get_privacy_spent(run, rounds),
        "clients": clients,
        "predictions": [asdict(one) for one in summarise_predictions(run, rounds)],
        "rounds": [_round(record) for record in rounds],
    }


def _checkpoint(number: int, checkpoint: CheckpointRecord) -> dict[str, Any]:
    return {"round": number} | asdict(checkpoint) | {"path": str(paths.get_runs_folder() / checkpoint.path)}


def _round(record: RoundRecord) -> dict[str, Any]:
    return {
        "number": record.number,
        "status": record.status,
        "reason": record.reason,
        "seconds": record.seconds,
        "device_type": record.device_type,
        "client_records": [asdict(client) for client in record.client_records],
        "client_scores": [asdict(score) for score in record.client_scores],
        "samples": [asdict(sample) for sample in record.samples],
        "task_scores": [asdict(score) for score in record.task_scores],
        "checkpoint": _checkpoint(record.number, record.checkpoint) if record.checkpoint else None,
    }
