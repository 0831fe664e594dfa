"""The results of runs as whole models in the cache, for commands that load a model or start from one."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.library.checkpoint_target import CheckpointTarget
    from fedtune.recipe.schema import Recipe

__all__ = ["export_base_run", "export_run_to_cache", "load_checkpoint_target"]


def load_checkpoint_target(target: str, round_number: int | None, store: str | None) -> "CheckpointTarget":
    """Read a run or a checkpoint file whose base model can be loaded."""
    from fedtune.library.checkpoint_target import read_checkpoint_target

    found = read_checkpoint_target(target, round_number, store)
    return found._replace(recipe=export_base_run(found.recipe, store))


def export_run_to_cache(reference: str, store: str | None) -> Path:
    """Return the folder of ``RUN`` or ``RUN@ROUND``. It is written once and found again."""
    return _export(reference, store)[2]


def export_base_run(recipe: "Recipe", store: str | None, *, new: bool = False) -> "Recipe":
    """Export the base model ``run:RUN[@ROUND]`` of a recipe, and return the recipe with its id and round.

    An exported base is reused, so that a resumed run starts from the same one. For a ``new`` run it is exported again
    if the round was done again since.
    """
    from fedtune.models.sources import is_made, run_folder

    kind, _, reference = recipe.model.source.partition(":")
    if kind != "run" or (is_made(run_folder(reference)) and not new):
        return recipe
    run, round_number, _ = _export(reference, store)
    source = f"run:{run}@{round_number}"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": source})})


def _export(reference: str, store: str | None) -> tuple[str, int, Path]:
    """Export a run, and first the run that it starts from, if any. Return its id, its round and the folder."""
    from fedtune import checkpoint
    from fedtune.errors import StoreError
    from fedtune.export import export_model
    from fedtune.models.sources import is_made, run_folder

    run, _, number = reference.partition("@")
    if number and not number.isdecimal():
        raise StoreError(f"run:{reference}: {number!r} is not a round number; write run:ID@ROUND, e.g. run:latest@0")
    found = load_checkpoint_target(run, int(number) if number else None, store)
    folder = run_folder(f"{found.run}@{found.round}")
    digest = checkpoint.hash_tensors(found.state)
    if is_made(folder) and digest not in (folder / "README.md").read_text(encoding="utf-8"):
        shutil.rmtree(folder)  # of another run of that id, or of a round that was done again since
    if not is_made(folder):
        card = f"# {found.run}\n\nRound {found.round}, SHA-256 {digest}.\n"
        export_model(found.recipe, found.state, folder, "model", card)
    return found.run, found.round, folder
