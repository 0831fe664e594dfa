"""A private adapter: each client trains a second low-rank pair beside each shared one, and keeps it.

What: where the shared model computes W x + s B A x, a client's own one computes W x + s (B A + B' A') x. In each step,
the private A' and B' take a step on the loss of the own model, and then the shared model takes its step without them.
A' begins as the shared A that the client receives in its first round, and B' as zero.
Sends: nothing more. A' and B' rest on the device, in a file beside what it keeps of the run; a device that was away
finds its own again. A round takes twice the steps; training holds the private pairs, which are small.
Scores: ``before`` and ``after`` of a client are those of its own model, and ``shared`` those of the shared one.
Use when: large models are tuned with ``lora`` or ``qlora`` and clients differ: the shared adapter is whole and
serves newcomers, while each client adds what is its own.
Avoid when: the head must be the client's own (``fedper``), or when there is no adapter. Techniques that compute
gradients of adapters by themselves give the private ones none, which is refused in the first step.
Settings: rank, scale, learning rate, steps and clipping are those of the shared adapter. Its dropout is left out.
Source: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models" (FedDPA, arXiv 2403.19211), read in
its abstract and in summaries. Ours deviates: both pairs are trained side by side, as in its iterative variant, and are
added up with equal weight; its weights for each example at test time are not built.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup, RoundEnd, Tensors
from fedtune.algorithms._personal_model import PersonalModel, clip_gradients, copy_in_single_precision
from fedtune.errors import ModelError, RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.techniques import build_techniques
from fedtune.wire.client_update import LowRankPair

__all__ = ["PrivateAdapter"]


class PrivateAdapter(Algorithm):
    """Trains a private adapter beside the shared one."""

    name: ClassVar[str] = "private-adapter"
    copies: ClassVar[int] = 4
    remembers: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True
    has_personal_model: ClassVar[bool] = True

    def check(self, recipe: Recipe, pipeline: MergePipeline) -> None:
        """Raise RecipeError without an adapter."""
        if all(one.get_update_kind() == "tensors" for one in build_techniques(recipe.train.techniques)):
            raise RecipeError(
                "federation.algorithm: private-adapter stands beside a shared adapter, and train.techniques adds none; "
                "add lora or qlora, or take ditto"
            )

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Read the private pairs, or begin them."""
        return _PrivateRound(setup)

    def describe_export(self) -> str:
        """Return which model it is."""
        return "This is the shared adapter. Each device keeps a private one beside it.\n"


class _PrivateRound(AlgorithmRound):
    def __init__(self, setup: AlgorithmSetup) -> None:
        self._pairs = _PrivatePairs(setup)
        self.personal = self._pairs

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Store the private pairs."""
        return RoundEnd({}, {name: one.detach() for name, one in self._pairs.factors.items()})


class _PrivatePairs(PersonalModel):
    def __init__(self, setup: AlgorithmSetup) -> None:
        self._setup = setup
        shared = dict(setup.model.named_parameters())
        self.factors = {
            name: nn.Parameter(_begin_factor(shared[name], setup.stored.get(name), zero=name == pair.left))
            for pair in setup.pairs
            for name in (pair.right, pair.left)
        }
        self._optimiser = setup.make_optimiser(list(self.factors.values()))

    @contextmanager
    def use_values(self) -> Iterator[None]:
        """Let each layer with a shared pair add the product of the private one."""
        with ExitStack() as stack:
            for pair in self._setup.pairs:
                layer = self._setup.model.get_submodule(_find_layer(pair))
                stack.callback(layer.register_forward_hook(self._make_hook(pair)).remove)
            yield

    def take_step(self, lr: float) -> None:
        """Move the private pairs; ModelError if no gradient has arrived at one."""
        lacking = [name for name, one in self.factors.items() if one.grad is None]
        if lacking:
            raise ModelError(
                f"federation.algorithm: private-adapter gets no gradient beside {lacking[0]}, because a technique "
                "computes it by itself; train with lora or qlora alone"
            )
        factors = list(self.factors.values())
        clip_gradients(factors, self._setup.recipe.train.max_grad_norm)
        self._optimiser.step(lr)
        for one in factors:
            one.grad = None

    def _make_hook(self, pair: LowRankPair) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        right, left = (
            self._setup.model.get_submodule(name.removesuffix(".weight")) for name in (pair.right, pair.left)
        )

        def add_product(_: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
            inner = _apply(right, self.factors[pair.right], given[0])
            return result + pair.scale * _apply(left, self.factors[pair.left], inner).to(result.dtype)

        return add_product


def _apply(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Return what a linear layer or convolution would compute with another weight."""
    dtype = next(module.parameters()).dtype
    found: Tensor = functional_call(module, {"weight": weight.to(dtype)}, (x.to(dtype),))
    return found


def _begin_factor(shared: Tensor, stored: Tensor | None, *, zero: bool) -> Tensor:
    found = copy_in_single_precision(shared)
    if stored is not None:
        return found.copy_(stored)
    return found.zero_() if zero else found


def _find_layer(pair: LowRankPair) -> str:
    """Return the name of the layer that both factors are part of."""
    parts = zip(pair.left.split("."), pair.right.split("."), strict=True)
    shared = []
    for one, other in parts:
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)
