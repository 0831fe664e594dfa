"""What ``evaluate`` and ``export`` take: a run, or one of a run's checkpoint files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.recipe import Recipe
    from fedtune.tracking import RoundRecord

__all__ = ["load_target"]


def load_target(target: str, number: int | None, store: str | None) -> "tuple[Recipe, Mapping[str, Tensor], str, int]":
    """Recipe, state, run and round of a run (by id, its beginning, or ``latest``) or of a checkpoint file."""
    from fedtune import checkpoint, home
    from fedtune.recipe import Recipe
    from fedtune.tracking import Store

    reference, number = _parsed(target, number)
    with Store.open(store) as opened:
        run = opened.run(reference)
        record = _round(opened.rounds(run.id), run.id, number)
    assert record.checkpoint is not None
    state = checkpoint.load(home.runs() / record.checkpoint.path, record.checkpoint.sha256)
    return Recipe.model_validate_json(run.recipe), state, run.id, record.number


def _parsed(target: str, number: int | None) -> tuple[str, int | None]:
    """A checkpoint file lies in the folder of its run and is named after its round."""
    path = Path(target)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise StoreError(
            f"{target} is a pickle, which can run any code; name a run or a .safetensors checkpoint of one"
        )
    if path.suffix != ".safetensors":
        return target, number
    if not path.exists():
        raise StoreError(f"there is no checkpoint {target}; see: fedtune runs list")
    digits = path.stem.removeprefix("round-")
    if not digits.isdigit():
        raise StoreError(f"{target} is not a checkpoint of a run; those are named round-NNNN.safetensors")
    return path.absolute().parent.name, int(digits)


def _round(rounds: "list[RoundRecord]", run: str, number: int | None) -> "RoundRecord":
    kept = [record for record in rounds if record.checkpoint is not None and number in (None, record.number)]
    if not kept:
        wanted = "a checkpoint" if number is None else f"a round {number}"
        raise StoreError(f"run {run} has not {wanted}; see: fedtune runs show {run}")
    return kept[-1]
