"""Tensors that never leave the device: one file for each of the last two rounds in which it trained.

The older file is for a repeated round, which must start from the same tensors as the first time.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedtune import checkpoint

__all__ = ["load_local_state", "save_local_state"]


def load_local_state(folder: Path, before: int) -> dict[str, Tensor]:
    """Return the newest tensors from a round earlier than ``before``; an empty dict if there are none."""
    earlier = [round_number for round_number in _rounds(folder) if round_number < before]
    return checkpoint.read_checkpoint(_path(folder, earlier[-1])) if earlier else {}


def save_local_state(folder: Path, round_number: int, tensors: Mapping[str, Tensor]) -> None:
    """Save the tensors of a round. Only these and those of the latest earlier round are kept.

    Later ones are of rounds that a rollback removed.
    """
    checkpoint.write_checkpoint(_path(folder, round_number), tensors)
    found = _rounds(folder)
    needed = [number for number in found if number <= round_number][-2:]
    for other in set(found) - set(needed):
        _path(folder, other).unlink()


def _path(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:04d}.safetensors"


def _rounds(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors"))
