"""FedRep: each client trains its own head on the received body, and then the body on that head.

What: as in ``fedper``, clients share the body and keep the head. The steps of a round come in two phases: the first
ones train the kept tensors alone, the others the shared ones alone. ``head_share`` is the share of the steps in the
first phase, rounded, but both phases have a step at least. A client with a single step trains both in it, and
so does a round whose techniques train only one of them. Running statistics follow all steps.
Sends: less, as kept tensors never travel. They rest on the device as with ``fedper``.
Use when: clients hold few classes each and have steps enough for both phases. The head fits before the body moves, so
that bodies of different clients agree more than with ``fedper``.
Avoid when: clients take few steps. Half of them do not train the body; raise ``train.local_epochs`` or lower
``head_share``. What else is said of ``fedper`` holds here too.
Cost: a step computes all gradients and uses those of its phase. Weight decay and moments act in a tensor's own phase.
Source: Collins et al., "Exploiting Shared Representations for Personalized Federated Learning" (arXiv 2102.07078),
Algorithm 1: tau head steps, then the body's. Their experiments take 10 epochs for the head and 1 or 5 for the body.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup
from fedtune.algorithms._kept_tensors import KEEP, Keep, describe_keep, select_kept_tensors
from fedtune.wire.client_update import LowRankPair

__all__ = ["Fedrep", "count_head_steps"]


class Fedrep(Algorithm):
    """Trains the kept tensors first, and the shared ones after them."""

    name: ClassVar[str] = "fedrep"
    keeps_tensors: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True
    keep: Keep = Field("head", description=KEEP)
    head_share: float = Field(0.5, gt=0, lt=1, description="share of a round's steps that train the kept tensors alone")

    def select_kept(self, model: nn.Module, trained: Sequence[str], pairs: Sequence[LowRankPair]) -> list[str]:
        """Return the names that ``keep`` matches."""
        return select_kept_tensors(self.name, self.keep, model, trained, pairs)

    def describe_export(self) -> str:
        """Return which values the kept tensors have."""
        return f"{describe_keep(self.keep)} the values from before training, because each device keeps its own.\n"

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Begin with the first phase."""
        return _FedrepRound(self.head_share, setup)


class _FedrepRound(AlgorithmRound):
    def __init__(self, head_share: float, setup: AlgorithmSetup) -> None:
        self._share = head_share
        kept = {id(one) for one in setup.kept.values()}
        trained = [one for one in setup.model.parameters() if one.requires_grad]
        body, head = ([one for one in trained if (id(one) in kept) is inside] for inside in (False, True))
        self._phases = (body, head) if body and head else ([], [])
        self._resting: list[nn.Parameter] = []

    def begin_step(self, step: int, local_steps: int) -> None:
        """Choose what rests in this step."""
        head_steps = count_head_steps(self._share, local_steps)
        self._resting = [] if local_steps == 1 else self._phases[step >= head_steps]

    def change_gradients(self) -> None:
        """Drop the gradients of what rests, so that the optimiser leaves it alone."""
        for parameter in self._resting:
            parameter.grad = None


def count_head_steps(share: float, steps: int) -> int:
    """Return how many of the steps, at least two, are in the first phase."""
    return min(max(1, round(share * steps)), steps - 1)
