"""FedDyn: a client's loss is tilted in every round, until its optimum is that of all clients.

What: client k minimises L_k(w) - <g_k, w> + alpha / 2 ||w - w_t||^2 from the received state w_t, so that each gradient
gains alpha (w - w_t) - g_k. Then g_k <- g_k - alpha (w_k - w_t), which is the gradient of L_k at the client's optimum.
The server follows h <- h - alpha / N sum_k (w_k - w_t) with N of all clients, and the next state is the mean of the
w_k minus h / alpha.
Sends: nothing more. g_k rests on the device, in a file beside what it keeps of the run, and h in the files of the run;
it is not sent. A device reads the g_k of its last round whose update was merged, so that h remains the mean of all
g_k when updates are lost. Training holds two more copies of what is trained.
Weights: all clients count alike, as in the paper.
Use when: clients differ much and have time for many steps each round. It reaches the optimum of the mean loss, as
``scaffold`` does, with half the bytes.
Avoid when: clients take few steps: the server moves by h / alpha as if each client had reached its optimum, so that a
small alpha overshoots and diverges. Raise alpha until the first rounds are stable. A few clients out of many make h
jump.
Source: Acar et al., "Federated Learning Based on Dynamic Regularization" (arXiv 2111.04263), Algorithm 1.
"""

from typing import ClassVar

from pydantic import Field

from fedtune.algorithms._algorithm import (
    Algorithm,
    AlgorithmRound,
    AlgorithmSetup,
    MergedUpdates,
    RoundEnd,
    ServerResult,
    Tensors,
)
from fedtune.algorithms._parameters import add_to_gradient, copy_parameters, move_to_parameters, sum_deltas
from fedtune.errors import RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe

__all__ = ["Feddyn"]


class Feddyn(Algorithm):
    """Adds a linear and a proximal term to the loss of clients, and corrects the mean."""

    name: ClassVar[str] = "feddyn"
    copies: ClassVar[int] = 2
    sends_more: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    fits_one_loss: ClassVar[bool] = True
    needs_one_start: ClassVar[bool] = True
    needs_exact_updates: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True
    weighs_equally: ClassVar[bool] = True
    alpha: float = Field(0.1, gt=0, description="strength of the dynamic regularisation")

    def check(self, recipe: Recipe, pipeline: MergePipeline) -> None:
        """Raise RecipeError if the merge is no plain mean, to which the server's correction belongs."""
        self.require_mean(pipeline)
        others = [step.name for step in pipeline.steps if step is not pipeline.combine]
        if others:
            raise RecipeError(
                f"federation.algorithm: feddyn takes the server's step itself, and {others[0]} would change it; "
                "drop one"
            )

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Read g_k, which is zero at first, and keep the received values."""
        return _FeddynRound(self.alpha, setup)

    def after_merge(self, merged: MergedUpdates) -> ServerResult:
        """Move h by the mean of the changes over all clients, and the state by -h / alpha."""
        state, memory = dict(merged.after), dict(merged.memory)
        for name, shape in merged.parameters.items():
            change = -self.alpha / merged.num_clients * sum_deltas(merged.updates, name, shape)
            correction = memory[name].double() + change if name in memory else change
            precision = merged.after[name].dtype
            state[name] = (merged.after[name].double() - correction / self.alpha).to(precision)
            memory[name] = correction.to(precision)
        return ServerResult(state, memory)


class _FeddynRound(AlgorithmRound):
    def __init__(self, alpha: float, setup: AlgorithmSetup) -> None:
        self._alpha, self._setup = alpha, setup
        self._start = copy_parameters(setup.parameters)
        self._gradient = move_to_parameters(setup.stored, setup.parameters)

    def change_gradients(self) -> None:
        """Add alpha (w - w_t) - g_k."""
        for name, parameter in self._setup.parameters.items():
            pull = self._alpha * (parameter.detach() - self._start[name])
            add_to_gradient(parameter, pull - self._gradient[name])

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Store g_k - alpha (w_k - w_t)."""
        stored = self._setup.stored  # in fp32, also where the model is not
        changes = {name: -self._alpha * delta[name] for name in self._setup.parameters}
        own = {name: stored[name] + change if name in stored else change for name, change in changes.items()}
        return RoundEnd({}, {**stored, **own})
