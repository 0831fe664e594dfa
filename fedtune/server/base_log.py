"""The increments of a run's base weights on disk: one file per merged round, beside the round's checkpoint.

A file contains the digests of the base weights before and after its round. The digests show whether a chain of files
leads from one version of the base weights to another. Old files are deleted when all files together are larger than the
base weights, because a client would then receive all base weights.
"""

from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fedtune.files import replace_file_atomically
from fedtune.merging import Increment, Increments, join_increments, split_increments
from fedtune.wire.stored_state import StoredState

__all__ = ["BaseLog", "Logged"]

_STEM = "increments-"


class Logged(NamedTuple):
    """The increments of one round: the digests of the base weights before and after it, and the file."""

    round_number: int
    before: str
    after: str
    path: Path

    @property
    def increments(self) -> dict[str, Increment]:
        """The increments by the weight's name; raises StoreError if the file cannot be read."""
        steps = split_increments(StoredState(self.path))[1]
        return steps[0] if steps else {}


class BaseLog:
    """The files in a run's folder. A file that cannot be read counts as missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = (_read(path) for path in sorted(folder.glob(f"{_STEM}*.safetensors")))
        self._logged = [one for one in found if one is not None]

    def save(self, round_number: int, before: str, after: str, increments: Increments) -> None:
        """Save a round's increments. The file is complete when this returns."""
        self.forget(round_number)
        path = self._folder / f"{_STEM}{round_number:04d}.safetensors"
        with replace_file_atomically(path) as beside:
            told = {"before": before, "after": after}
            safetensors.torch.save_file(join_increments([increments]), beside, metadata=told)
        self._logged.append(Logged(round_number, before, after, path))

    def forget(self, round_number: int) -> None:
        """Delete the files of ``round_number`` and later rounds, which were not committed or were rolled back."""
        for one in (one for one in self._logged if one.round_number >= round_number):
            one.path.unlink(missing_ok=True)
        self._logged = [one for one in self._logged if one.round_number < round_number]

    def trim(self, most: int) -> None:
        """Delete the oldest files as long as the newer ones have ``most`` bytes or more."""
        total = 0
        for place in range(len(self._logged) - 1, -1, -1):
            if total >= most:
                for one in self._logged[: place + 1]:
                    one.path.unlink(missing_ok=True)
                self._logged = self._logged[place + 1 :]
                return
            total += self._logged[place].path.stat().st_size

    def get_digest_before(self, round_number: int) -> str | None:
        """Return the digest of the base weights at the start of a round; None if its file is missing."""
        return next((one.before for one in self._logged if one.round_number == round_number), None)

    def list_rounds_between(self, before: str, after: str) -> list[Logged] | None:
        """Return the rounds, in order, that lead from one digest to another; None if there is no such chain."""
        chain: list[Logged] = []
        wanted = after
        for one in reversed(self._logged):
            if wanted == before:
                break
            if one.after != wanted:
                return None
            chain.append(one)
            wanted = one.before
        return chain[::-1] if wanted == before else None


def _read(path: Path) -> Logged | None:
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        return Logged(int(path.stem.removeprefix(_STEM)), told["before"], told["after"], path)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
