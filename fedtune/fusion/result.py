"""From a prepared merge to a folder that plain transformers loads."""

from pathlib import Path

from fedtune.fusion.documents import add_documents
from fedtune.fusion.fuse import Merge, Progress, fill
from fedtune.fusion.mend import renormalise
from fedtune.fusion.output import opening
from fedtune.merging import Evidence

__all__ = ["CARD", "SHARD_SIZE", "merge", "unseen"]

SHARD_SIZE = 5_000_000_000
CARD = "README.md"


def unseen(done: int) -> None:
    """For callers that show no progress."""


def merge(
    prepared: Merge,
    folder: Path,
    card: str,
    *,
    shard_size: int = SHARD_SIZE,
    evidence: Evidence = Evidence(),  # noqa: B008 - an immutable value
    progress: Progress = unseen,
) -> None:
    """Write the merge to a new folder, whole or not at all; an interrupted one goes on where it stopped.

    Raises StoreError when the folder exists or the disk is full, ModelError for values that are not finite.
    """
    shards = prepared.shards(shard_size)
    with opening(folder, shards, prepared.key()) as output:
        parts = fill(prepared, output, evidence, progress)
        if prepared.steps.renormalise:
            renormalise(prepared, output, parts, evidence)
        add_documents(prepared, output.folder, shards)
        (output.folder / CARD).write_text(card, encoding="utf-8")
