"""The target of ``evaluate`` and ``export``: a run, or a checkpoint file of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.recipe.schema import Recipe
    from fedtune.tracking import RoundRecord

__all__ = ["load_checkpoint_target"]


def load_checkpoint_target(
    target: str, number: int | None, store: str | None
) -> "tuple[Recipe, Mapping[str, Tensor], str, int]":
    """Recipe, state, run and round of a run (by id, its beginning, or ``latest``) or of a checkpoint file."""
    from fedtune import checkpoint, paths
    from fedtune.cli.cached_export import with_base
    from fedtune.recipe.schema import Recipe
    from fedtune.tracking import Store
    from fedtune.tracking.pruning import find_checkpointed_round

    file = _file(target)
    if file is not None and number is not None:
        raise StoreError(f"{target} is already the checkpoint of one round; remove --round, or name the run")
    reference, number = (target, number) if file is None else _named(file)
    with Store.open(store) as opened:
        run = opened.run(reference)
        rounds = opened.rounds(run.id)
    there = find_checkpointed_round if file is None else _recorded  # a file may be a copy of one that was pruned
    record = there(run.id, rounds, number)
    assert record.checkpoint is not None
    state = checkpoint.read_checkpoint(
        file or paths.get_runs_folder() / record.checkpoint.path, record.checkpoint.sha256
    )
    return with_base(Recipe.model_validate_json(run.recipe), store), state, run.id, record.number


def _file(target: str) -> Path | None:
    """Return the checkpoint file that a target names, if any."""
    path = Path(target)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise StoreError(
            f"{target} is a pickle, which can run any code; name a run or a .safetensors checkpoint of one"
        )
    if path.suffix == ".safetensors" and not path.exists():
        raise StoreError(f"there is no checkpoint {target}; see: fedtune runs list")
    return path if path.suffix == ".safetensors" else None


def _named(file: Path) -> tuple[str, int]:
    """A checkpoint file lies in a folder named after its run and is itself named after its round."""
    digits = file.stem.removeprefix("round-")
    if not digits.isdigit():
        raise StoreError(f"{file} is not a checkpoint of a run; those are named round-NNNN.safetensors")
    return file.absolute().parent.name, int(digits)


def _recorded(run: str, rounds: "Sequence[RoundRecord]", number: int | None) -> "RoundRecord":
    found = [record for record in rounds if record.checkpoint is not None and record.number == number]
    if not found:
        raise StoreError(f"run {run} has not recorded a round {number}; see: fedtune runs show {run}")
    return found[0]
