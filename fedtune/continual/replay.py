"""Experience replay: each step also trains on stored examples of earlier tasks.

What: the device keeps a sample of the examples it has trained on. In later tasks, each step adds the mean loss of a
batch of them, drawn anew, to that of the batch of new examples.
Stores: a share of the client's examples (5 % by default), or a number of bytes of them, in their stored form: pixels,
tokens or samples, and the label. By class (``keep: classes``), by task (``domains``) or as a plain sample
(``reservoir``). Which examples is decided by a hash, so that a repeated round or a repeated example changes nothing.
Costs: a second forward and backward pass of as many examples in each step, about twice the time; no memory of the
process beyond the stored examples, as the passes follow each other. Nothing more is sent.
Use when: devices may keep some of their examples. It is the strongest simple method.
Avoid when: examples must not be kept; see ``own_memory`` for their encryption.
Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning" (arXiv 1902.10486), algorithm 1, with the
ring buffer and the reservoir of section 4. Deviations: the two means are added, with ``weight`` for the stored ones,
where the paper takes the mean of both batches; the sample is that of the smallest hashes; examples of a task are drawn
in later tasks only, except in a class stream with ``loss: new``, which needs them to learn new classes at all.
"""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.continual._method import MethodRound, MethodSetup
from fedtune.continual._rehearsal import Rehearsal, RehearsalMemory, open_memory
from fedtune.continual._rehearsal_round import RehearsalRound

__all__ = ["Replay"]


class Replay(Rehearsal):
    """Train on stored examples too."""

    name: ClassVar[str] = "replay"

    weight: float = Field(1.0, gt=0, description="of the loss on stored examples")

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Read the stored examples."""
        return _ReplayRound(setup, open_memory(self, setup), self)


class _ReplayRound(RehearsalRound):
    def __init__(self, setup: MethodSetup, memory: RehearsalMemory, method: Replay) -> None:
        super().__init__(setup, memory, method.name)
        self._weight = method.weight

    def iter_memory_losses(self) -> Iterator[Tensor]:
        """Yield the loss of a draw in micro-batches."""
        for part in self.iter_parts(self.examples, self.draw("examples", self.examples)):
            yield self._weight * part.share * part.loss
