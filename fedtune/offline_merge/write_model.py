"""Write a prepared merge as a folder that transformers loads."""

from pathlib import Path

from fedtune.merging import MergeContext
from fedtune.offline_merge.model_files import write_model_files
from fedtune.offline_merge.output_folder import open_output_folder
from fedtune.offline_merge.renormalise_output import renormalise_output
from fedtune.offline_merge.run_merge import PreparedMerge, ProgressCallback, write_merged_tensors

__all__ = ["CARD", "SHARD_SIZE", "ignore_progress", "write_merged_model"]

SHARD_SIZE = 5_000_000_000
CARD = "README.md"


def ignore_progress(done: int) -> None:
    """Show no progress."""


def write_merged_model(
    prepared: PreparedMerge,
    folder: Path,
    card: str,
    *,
    shard_size: int = SHARD_SIZE,
    context: MergeContext = MergeContext(),  # noqa: B008 - an immutable value
    progress: ProgressCallback = ignore_progress,
) -> None:
    """Write the merge to a new folder, completely or not at all. An interrupted merge continues where it stopped.

    Raises StoreError if the folder exists or the disk is full, ModelError for values that are not finite.
    """
    shards = prepared.plan_shards(shard_size)
    with open_output_folder(folder, shards, prepared.compute_resume_key()) as output:
        parts = write_merged_tensors(prepared, output, context, progress)
        if prepared.steps.renormalise:
            renormalise_output(prepared, output, parts, context)
        write_model_files(prepared, output.folder, shards)
        (output.folder / CARD).write_text(card, encoding="utf-8")
