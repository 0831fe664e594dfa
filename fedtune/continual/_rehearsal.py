"""What methods share that keep examples of earlier tasks on the device: their settings, and the choice of examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, ByteSize, Field, model_validator
from torch import Tensor

from fedtune.continual._buffer import Candidate, Choice, choose_examples, hash_example
from fedtune.continual._method import ContinualMethod, MethodSetup
from fedtune.continual._replay_store import GROUP_BYTES, ROW_BYTES, ReplayStore, read_store
from fedtune.continual._storage import find_content_limit
from fedtune.continual._stored_rows import has_equal_sizes, pack_examples
from fedtune.errors import DataError, MemoryBudgetError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["Rehearsal", "RehearsalMemory", "open_memory"]


def _read_percent(value: Any) -> Any:
    """Turn ``5%`` into 0.05."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


class Rehearsal(ContinualMethod):
    """A method that keeps examples. It stores a share of the client's examples, or a number of bytes of them."""

    share: Annotated[float, BeforeValidator(_read_percent)] | None = Field(
        None, gt=0, le=1, description="of the client's examples when it begins the run, e.g. 5%, the default"
    )
    bytes: ByteSize | None = Field(None, ge=1, description="of stored examples, in place of a share, e.g. 64KB")
    keep: Literal["classes", "domains", "reservoir"] = Field(
        "classes", description="equally many bytes of each class or of each task, or a plain sample of all examples"
    )

    @model_validator(mode="after")
    def _give_one_size(self) -> Self:
        if self.share is not None and self.bytes is not None:
            raise ValueError("share and bytes are both given; drop one")
        return self

    def count_stored_bytes(self) -> int:
        """Return ``bytes``; a share is known on the device alone."""
        return int(self.bytes or 0)

    def check(self, recipe: Recipe) -> None:
        """Refuse classes where the examples have none."""
        task = get_task(recipe.task)
        if self.keep == "classes" and not task.has_classes:
            raise RecipeError(
                f"stream.memory: {self.name} keeps examples by class, but those of {task.name} have none; set "
                "keep: domains or keep: reservoir"
            )


@dataclass(frozen=True)
class RehearsalMemory:
    """What a device stored in earlier visits, and the choice among these examples and the rows of the task.

    A place of the choice below ``len(store.contents)`` is a stored example, a larger one a row of the task.
    """

    store: ReplayStore
    rows: NDArray[np.int64]
    groups: Sequence[int]
    choice: Choice

    @property
    def chosen_rows(self) -> list[int]:
        """The rows of the task that are to be stored."""
        stored = len(self.store.contents)
        return [int(self.rows[place - stored]) for place in self.choice.places if place >= stored]

    def merge(self, setup: MethodSetup, outputs: Mapping[int, Tensor] | None = None) -> ReplayStore:
        """Return the store after the task. With ``outputs`` by row, rows without any are left out."""
        stored = len(self.store.contents)
        places = [
            place
            for place in self.choice.places
            if place < stored or outputs is None or int(self.rows[place - stored]) in outputs
        ]
        contents = [
            self.store.contents[place]
            if place < stored
            else pack_examples(setup.examples, [int(self.rows[place - stored])])[0]
            for place in places
        ]
        merged = replace(
            self.store,
            contents=contents,
            groups=[self.groups[place] for place in places],
            limits=self.choice.limits,
        )
        if outputs is None:
            return merged
        kept = [
            self._get_stored_output(place) if place < stored else outputs[int(self.rows[place - stored])]
            for place in places
        ]
        return replace(merged, outputs=torch.stack(kept) if kept else torch.zeros(0, setup.num_labels))

    def _get_stored_output(self, place: int) -> Tensor:
        assert self.store.outputs is not None
        return self.store.outputs[place]


def open_memory(method: Rehearsal, setup: MethodSetup, output_bytes: int = 0) -> RehearsalMemory:
    """Choose among the stored examples and the client's rows. An example takes ``output_bytes`` beside its own.

    Raises MemoryBudgetError if the memory has no room for an example of each group.
    """
    extra = ROW_BYTES + output_bytes
    store = _find_store(method, setup, extra)
    groups = [*store.groups, *_find_groups(method, setup)]
    candidates = [
        _make_candidate(setup, content, group, extra)
        for content, group in zip(_iter_contents(store, setup), groups, strict=True)
    ]
    known = {*groups, *store.limits}
    choice = choose_examples(
        candidates,
        store.limits,
        _count_room(method, setup, store.budget, len(known), max(one.size for one in candidates)),
        equal_sizes=has_equal_sizes(setup.examples),
    )
    _require_each_group(method, store.budget, known - {groups[place] for place in choice.places}, known)
    return RehearsalMemory(store, setup.rows, groups, choice)


def _count_room(method: Rehearsal, setup: MethodSetup, budget: int, groups: int, largest: int) -> int:
    """Return the bytes for examples, beside those for groups.

    A share leaves room for an example of each group, if the device may store that.
    """
    limit = find_content_limit(setup.recipe, setup.client) if method.bytes is None else budget
    room = budget if method.bytes is not None else max(budget, groups * largest)
    return room if limit is None else max(0, min(room, limit - GROUP_BYTES * groups))


def _iter_contents(store: ReplayStore, setup: MethodSetup) -> Any:
    """Yield the contents of the stored examples and of the rows, one at a time: all of them may need much memory."""
    yield from store.contents
    for row in setup.rows.tolist():
        yield from pack_examples(setup.examples, [row])


def _make_candidate(setup: MethodSetup, content: bytes, group: int, extra: int) -> Candidate:
    return Candidate(hash_example(setup.recipe.seed, setup.client, content), group, len(content) + extra)


def _find_store(method: Rehearsal, setup: MethodSetup, extra: int) -> ReplayStore:
    """Return what the newest earlier visit stored, or an empty store. A share counts from the first visit on."""
    if setup.stored:
        store = read_store(setup.stored[max(setup.stored)])
        return store if method.bytes is None else replace(store, budget=int(method.bytes))
    if method.bytes is not None:
        return ReplayStore(int(method.bytes))
    return ReplayStore(_count_share(method, setup, extra))


def _count_share(method: Rehearsal, setup: MethodSetup, extra: int) -> int:
    """Return the bytes of a share of all examples that the client has."""
    share = 0.05 if method.share is None else method.share
    rows = setup.rows if setup.all_rows is None else setup.all_rows
    return int(share * sum(len(pack_examples(setup.examples, [row])[0]) + extra for row in rows.tolist()))


def _find_groups(method: Rehearsal, setup: MethodSetup) -> list[int]:
    """Return the group of each row of the task."""
    if method.keep == "classes":
        return _read_labels(setup, setup.rows)
    return [setup.place.task if method.keep == "domains" else 0] * len(setup.rows)


def _read_labels(setup: MethodSetup, rows: NDArray[np.int64]) -> list[int]:
    labels = getattr(setup.examples, "labels", None)
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise DataError("the examples have no class, by which they are to be kept; set keep: domains or reservoir")
    found: list[int] = labels[torch.from_numpy(rows)].tolist()
    return found


def _require_each_group(method: Rehearsal, budget: int, empty: set[int], known: set[int]) -> None:
    if not empty:
        return
    what = {"classes": "classes", "domains": "tasks", "reservoir": "samples"}[method.keep]
    raise MemoryBudgetError(
        f"{method.name} has {budget} bytes for examples of {len(known)} {what}, which leaves no room for one of "
        f"{'class' if method.keep == 'classes' else 'number'} {min(empty)}; raise bytes or stream.own_memory.budget",
        code="replay-short",
        counts={"bytes": budget, "groups": len(known), "empty": len(empty)},
    )
