"""The increments of a run's base weights at rest: one file per merged round, beside the round's checkpoint.

A file tells the digests of the base before and after its round, so that a chain of files leads from one base to
another, or is seen to be broken. Old files go once all together are larger than the base itself: then the whole base
is what a client would be sent.
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
    """What round ``round_number`` added: the digests of the base before and after it, and the file."""

    round_number: int
    before: str
    after: str
    path: Path

    @property
    def increments(self) -> dict[str, Increment]:
        """By the weight's name; StoreError when the file cannot be read."""
        steps = split_increments(StoredState(self.path))[1]
        return steps[0] if steps else {}


class BaseLog:
    """The files in a run's folder; one that cannot be read counts as absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = (_read(path) for path in sorted(folder.glob(f"{_STEM}*.safetensors")))
        self._logged = [one for one in found if one is not None]

    def save(self, round_number: int, before: str, after: str, increments: Increments) -> None:
        """Keep a round's increments; the file is whole once this returns."""
        self.forget(round_number)
        path = self._folder / f"{_STEM}{round_number:04d}.safetensors"
        with replace_file_atomically(path) as beside:
            told = {"before": before, "after": after}
            safetensors.torch.save_file(join_increments([increments]), beside, metadata=told)
        self._logged.append(Logged(round_number, before, after, path))

    def forget(self, round_number: int) -> None:
        """Drop round ``round_number`` and later ones: they were not committed, or were taken back."""
        for one in (one for one in self._logged if one.round_number >= round_number):
            one.path.unlink(missing_ok=True)
        self._logged = [one for one in self._logged if one.round_number < round_number]

    def trim(self, most: int) -> None:
        """Drop the oldest files while the others alone have ``most`` bytes or more."""
        total = 0
        for place in range(len(self._logged) - 1, -1, -1):
            if total >= most:
                for one in self._logged[: place + 1]:
                    one.path.unlink(missing_ok=True)
                self._logged = self._logged[place + 1 :]
                return
            total += self._logged[place].path.stat().st_size

    def get_digest_before(self, round_number: int) -> str | None:
        """The digest of the base that round ``round_number`` began with; None where its file is not there."""
        return next((one.before for one in self._logged if one.round_number == round_number), None)

    def list_rounds_between(self, before: str, after: str) -> list[Logged] | None:
        """The newest rounds, in order, if they lead from one base to another; None when they do not."""
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
