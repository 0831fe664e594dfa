"""A run's result as a whole model in the cache, for commands that read models."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.recipe.schema import Recipe

__all__ = ["export_run_to_cache", "with_base"]


def export_run_to_cache(reference: str, store: str | None) -> Path:
    """The folder of ``RUN`` or ``RUN@ROUND``; it is written once and found again."""
    return _export(reference, store)[2]


def with_base(recipe: "Recipe", store: str | None, *, new: bool = False) -> "Recipe":
    """A recipe whose base can be loaded: of ``run:RUN`` and ``run:RUN@ROUND``, id and round written out, it is made.

    A base that was made before is left as it is, so that a run that goes on begins with the same one; a ``new`` run
    has it made again where the round was done again since.
    """
    from fedtune.models.sources import is_made, run_folder

    kind, _, reference = recipe.model.source.partition(":")
    if kind != "run" or (is_made(run_folder(reference)) and not new):
        return recipe
    run, at, _ = _export(reference, store)
    source = f"run:{run}@{at}"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": source})})


def _export(reference: str, store: str | None) -> tuple[str, int, Path]:
    from fedtune import checkpoint
    from fedtune.cli.checkpoint_target import load_checkpoint_target
    from fedtune.errors import StoreError
    from fedtune.export import export_model
    from fedtune.models.sources import is_made, run_folder

    run, _, number = reference.partition("@")
    if number and not number.isdecimal():
        raise StoreError(f"run:{reference}: {number!r} is no round; write run:ID@ROUND, e.g. run:latest@0")
    recipe, state, found, at = load_checkpoint_target(run, int(number) if number else None, store)
    folder = run_folder(f"{found}@{at}")
    digest = checkpoint.hash_tensors(state)
    if is_made(folder) and digest not in (folder / "README.md").read_text(encoding="utf-8"):
        shutil.rmtree(folder)  # of another run of that id, or of a round that was done again since
    if not is_made(folder):
        export_model(recipe, state, folder, "full", f"# {found}\n\nRound {at}, SHA-256 {digest}.\n")
    return found, at, folder
