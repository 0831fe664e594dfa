"""The target of ``evaluate`` and ``export``: a run, or a checkpoint file of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedtune.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.recipe.schema import Recipe
    from fedtune.tracking import RoundRecord

__all__ = ["CheckpointTarget", "read_checkpoint_target"]


class CheckpointTarget(NamedTuple):
    """A checkpoint and the recorded recipe of its run, whose base model may be the result of another run."""

    recipe: "Recipe"
    state: "Mapping[str, Tensor]"
    run: str
    round: int


def read_checkpoint_target(target: str, round_number: int | None, store: str | None) -> CheckpointTarget:
    """Read a run (by id, the beginning of its id, or ``latest``) or a checkpoint file."""
    from fedtune import checkpoint, paths
    from fedtune.recipe.recorded_recipe import parse_recorded_recipe
    from fedtune.tracking import Store
    from fedtune.tracking.pruning import find_checkpointed_round

    file = _find_checkpoint_file(target)
    if file is not None and round_number is not None:
        raise StoreError(f"{target} is already the checkpoint of one round; remove --round, or name the run")
    reference, round_number = (target, round_number) if file is None else _parse_checkpoint_path(file)
    with Store.open(store) as opened:
        run = opened.run(reference)
        rounds = opened.rounds(run.id)
    find = (
        find_checkpointed_round if file is None else _find_recorded_round
    )  # a file may be a copy of a pruned checkpoint
    record = find(run.id, rounds, round_number)
    assert record.checkpoint is not None
    state = checkpoint.read_checkpoint(
        file or paths.get_runs_folder() / record.checkpoint.path, record.checkpoint.sha256
    )
    return CheckpointTarget(parse_recorded_recipe(run.recipe, run.id), state, run.id, record.number)


def _find_checkpoint_file(target: str) -> Path | None:
    """Return the checkpoint file that a target names, if any."""
    path = Path(target)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise StoreError(
            f"{target} is a pickle, which can run any code; name a run or a .safetensors checkpoint of one"
        )
    if path.suffix == ".safetensors" and not path.exists():
        raise StoreError(f"there is no checkpoint {target}; see: fedtune runs list")
    return path if path.suffix == ".safetensors" else None


def _parse_checkpoint_path(file: Path) -> tuple[str, int]:
    """Return the run, which the folder is named after, and the round, which the file is named after."""
    digits = file.stem.removeprefix("round-")
    if not digits.isdigit():
        raise StoreError(f"{file} is not a checkpoint of a run; those are named round-NNNN.safetensors")
    return file.absolute().parent.name, int(digits)


def _find_recorded_round(run: str, rounds: "Sequence[RoundRecord]", round_number: int | None) -> "RoundRecord":
    found = [record for record in rounds if record.checkpoint is not None and record.number == round_number]
    if not found:
        raise StoreError(f"run {run} has not recorded a round {round_number}; see: fedtune runs show {run}")
    return found[0]
