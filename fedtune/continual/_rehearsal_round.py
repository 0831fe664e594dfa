"""A client's round of a method that trains on stored examples: the draws, their batches and their losses."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fedtune.continual._masked_head import mask_classes
from fedtune.continual._method import MethodRound, MethodSetup, Tensors
from fedtune.continual._rehearsal import RehearsalMemory
from fedtune.continual._replay_store import write_store
from fedtune.continual._stored_rows import unpack_examples
from fedtune.data import EncodedDataset
from fedtune.data.augmentation import AugmentedPictures
from fedtune.data.pixels import EncodedPictures

__all__ = ["Part", "RehearsalRound"]


class Part(NamedTuple):
    """A micro-batch of stored examples: their places, their share of the draw's predictions, the loss, the logits."""

    places: list[int]
    share: float
    loss: Tensor
    logits: Tensor | None


class RehearsalRound(MethodRound):
    """Draws from the examples of earlier visits. The random numbers of a step depend on the round and the step alone.

    In a class stream with ``loss: new``, the new rows' loss never compares them with old classes, so draws then include
    the examples of the task that are to be stored.
    """

    def __init__(self, setup: MethodSetup, memory: RehearsalMemory, purpose: str) -> None:
        self.setup, self.memory, self.step = setup, memory, 0
        self._seeds, self._purpose = dict[str, int](), purpose
        self._sizes: list[int] = []
        self._first_row: int | None = None
        contents = list(memory.store.contents)
        self.stored = _unpack(setup, contents)
        whole = memory.merge(setup).contents if contents and _compares_new(setup) else contents
        self.examples = self.stored if whole is contents else _unpack(setup, whole)

    def compute_batch_term(self, rows: Sequence[int], batch: Tensors, logits: Tensor | None) -> Tensor | None:
        """Note the size of micro-batches, which those of stored examples do not exceed. A step may begin again."""
        if self._first_row is None or rows[0] == self._first_row:
            self._first_row, self._sizes = rows[0], []
        self._sizes.append(len(rows))
        return None

    def change_gradients(self) -> None:
        """Count the step."""
        self.step, self._first_row = self.step + 1, None

    def list_stored_tensors(self) -> dict[str, Tensor]:
        """Return the store after this visit."""
        return write_store(self.memory.merge(self.setup))

    def draw(self, purpose: str, examples: EncodedDataset | None) -> list[int]:
        """Draw a batch of different stored examples for the step; none without any."""
        if examples is None:
            return []
        name = f"{self._purpose}-{purpose}"
        seed = self._seeds.setdefault(name, self.setup.derive_seed(name))
        count = min(self.setup.recipe.train.batch_size, len(examples))
        drawn: list[int] = np.random.default_rng([seed, self.step]).choice(len(examples), count, replace=False).tolist()
        return drawn

    def iter_parts(self, examples: EncodedDataset | None, drawn: Sequence[int]) -> Iterator[Part]:
        """Yield the micro-batches of a draw after their forward pass, one at a time."""
        if examples is None or not drawn:
            return
        seen = _augment(self.setup, examples, self.setup.derive_seed(f"{self._purpose}-augmentation"), self.step)
        groups = [part for places in _split_by_mask(self.setup, examples, drawn) for part in self._split(places)]
        batches = [seen.make_batch(places) for places in groups]
        counts = [self.setup.task.count_predictions(batch["labels"]) for batch in batches]
        assert self.setup.run_forward is not None
        for places, batch, count in zip(groups, batches, counts, strict=True):
            if count:
                with _mask(self.setup, batch):
                    loss, logits = self.setup.run_forward(batch)
                yield Part(places, count / sum(counts), loss, logits)

    def _split(self, places: Sequence[int]) -> Iterator[list[int]]:
        size = max(self._sizes, default=self.setup.micro_batch_size or len(places))
        size = size if self.setup.task.can_split_batch else len(places)
        for start in range(0, len(places), size):
            yield list(places[start : start + size])


def _unpack(setup: MethodSetup, contents: Sequence[bytes]) -> EncodedDataset | None:
    padding = getattr(getattr(setup.model, "config", None), "pad_token_id", None)
    return unpack_examples(setup.examples, contents, padding or 0) if contents else None


def _compares_new(setup: MethodSetup) -> bool:
    stream = setup.recipe.stream
    return stream is not None and stream.setting == "class" and stream.loss == "new"


def _augment(setup: MethodSetup, examples: EncodedDataset, seed: int, step: int) -> EncodedDataset:
    """Return stored pictures, changed at random as those of the task are."""
    settings = setup.recipe.train.augmentation
    if settings is None:
        return examples
    assert isinstance(examples, EncodedPictures), "only tasks with images accept augmentation"
    return AugmentedPictures(examples, settings, seed, step)


def _split_by_mask(setup: MethodSetup, examples: EncodedDataset, drawn: Sequence[int]) -> list[list[int]]:
    """Split a draw into examples of one task each where every task has a head of its own."""
    if setup.recipe.stream is None or setup.recipe.stream.setting != "task":
        return [list(drawn)]
    labels = examples.make_batch(drawn)["labels"].tolist()
    tasks = [_find_task(setup, label) for label in labels]
    return [[place for place, one in zip(drawn, tasks, strict=True) if one == task] for task in sorted(set(tasks))]


def _find_task(setup: MethodSetup, label: int) -> int:
    assert setup.list_classes is not None
    for task in range(setup.num_tasks):  # with a blur, an example may be of a task that has not begun
        classes = setup.list_classes([task])
        if classes is None or label in classes:
            return task
    return setup.place.task


def _mask(setup: MethodSetup, batch: Tensors) -> AbstractContextManager[Any]:
    """Let the model predict the classes that the examples are compared with, where these are not the task's own."""
    stream = setup.recipe.stream
    if stream is None or setup.list_classes is None:
        return nullcontext()
    if stream.setting == "task":
        task = _find_task(setup, int(batch["labels"][0]))
        return mask_classes(setup.model, setup.list_classes([task], neighbours=True), setup.num_labels)
    if _compares_new(setup):
        return mask_classes(setup.model, setup.list_classes(setup.place.seen, neighbours=True), setup.num_labels)
    return nullcontext()
