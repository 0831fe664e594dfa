"""Dark experience replay (DER++): replay of stored examples and of what the model said of them when it trained on them.

What: the device keeps a sample of its examples with the logits that the model gave them in training. In later tasks,
each step adds ``alpha`` times the mean squared difference between the stored and the present logits of one draw, and
``beta`` times the loss of another, independent draw.
Stores: as ``replay``, and four bytes for each class with every example. Classes that the model could not predict when
an example was stored are left out of the difference.
Costs: two more forward and backward passes of a batch in each step. Nothing more is sent.
Use when: devices may keep examples and the task is a classification.
Avoid when: there are thousands of classes, whose logits take more bytes than the examples.
Source: Buzzega et al., "Dark Experience for General Continual Learning" (arXiv 2004.07211), equation 6. Deviations: the
mean over the classes, as the authors' code has it, where the paper has the sum; the sample is that of the smallest
hashes instead of a reservoir; logits are those of a visit's last round, and an example that this round did not reach is
not stored.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.continual._method import MethodRound, MethodSetup, Tensors
from fedtune.continual._rehearsal import Rehearsal, RehearsalMemory, open_memory
from fedtune.continual._rehearsal_round import Part, RehearsalRound
from fedtune.continual._replay_store import write_store
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["Der"]

_LOGIT_BYTES = 4


class Der(Rehearsal):
    """Train on stored examples and their logits."""

    name: ClassVar[str] = "der"

    alpha: float = Field(0.1, ge=0, description="weight of the squared difference of logits")
    beta: float = Field(1.0, ge=0, description="weight of the loss on stored examples")

    def check(self, recipe: Recipe) -> None:
        """Refuse tasks without a classifier."""
        task = get_task(recipe.task)
        if not task.has_classes:
            raise RecipeError(f"stream.memory: der stores the logits of classes, but {task.name} has none; use replay")
        super().check(recipe)

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Read the stored examples."""
        return _DerRound(setup, open_memory(self, setup, _LOGIT_BYTES * setup.num_labels), self)


class _DerRound(RehearsalRound):
    def __init__(self, setup: MethodSetup, memory: RehearsalMemory, method: Der) -> None:
        super().__init__(setup, memory, method.name)
        self._method = method
        self._wanted, self._outputs = set(memory.chosen_rows), dict[int, Tensor]()

    def compute_batch_term(self, rows: Sequence[int], batch: Tensors, logits: Tensor | None) -> Tensor | None:
        """Keep the logits of the rows that are to be stored, as they are now."""
        super().compute_batch_term(rows, batch, logits)
        wanted = [place for place, row in enumerate(rows) if row in self._wanted]
        if logits is not None and wanted:
            now = logits.detach()[wanted].float().cpu()
            self._outputs.update({rows[place]: one for place, one in zip(wanted, now, strict=True)})
        return None

    def iter_memory_losses(self) -> Iterator[Tensor]:
        """Yield the differences of logits of one draw, then the loss of another."""
        if self._method.alpha:
            drawn = self.draw("logits", self.stored)
            known = max(1, int(self._read_outputs(drawn).isfinite().sum())) if drawn else 1
            for part in self.iter_parts(self.stored, drawn):
                yield self._method.alpha * self._sum_squares(part) / known
        if self._method.beta:
            for part in self.iter_parts(self.examples, self.draw("labels", self.examples)):
                yield self._method.beta * part.share * part.loss

    def list_stored_tensors(self) -> dict[str, Tensor]:
        """Return the store after this visit, with logits."""
        return write_store(self.memory.merge(self.setup, self._outputs))

    def _read_outputs(self, places: Sequence[int]) -> Tensor:
        assert self.memory.store.outputs is not None
        return self.memory.store.outputs[torch.tensor(places)]

    def _sum_squares(self, part: Part) -> Tensor:
        """Return the sum over the classes that the model could predict when the examples were stored."""
        assert part.logits is not None
        stored = self._read_outputs(part.places).to(part.logits.device)
        known = stored.isfinite()
        return (part.logits.float()[known] - stored[known]).square().sum()
