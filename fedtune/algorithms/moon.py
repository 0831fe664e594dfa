"""MOON: what a client's model makes of an example is drawn to the received model and away from its own earlier one.

What: the loss gains mu times -log(e^(s_g / tau) / (e^(s_g / tau) + e^(s_p / tau))). z is what enters the last layer,
s_g its cosine with the z of the received model, and s_p that with the z of the model that the client had trained in its
last merged round. Both other models are evaluated without dropout and have no gradient. A client without an earlier
model trains without the term.
Sends: nothing more. The earlier model's trained tensors rest on the device. A step computes two more forward passes,
and training holds two more copies of what is trained. With one low-rank factor per round, the earlier model has the
other factor of the received one.
Use when: clients train whole image or text encoders for many steps on data of few classes.
Avoid when: the representation is frozen (``head-only``), so that the term is constant, or clients are rarely sampled,
so that their earlier model is old. Decoders, whose last layer sees every token, are refused. It costs most of the
methods here, and its gain over ``fedprox`` is often small.
Source: Li et al., "Model-Contrastive Federated Learning" (arXiv 2103.16257), Algorithm 1. Ours: no
projection head is added, so that the model stays what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from fedtune.algorithms._algorithm import Algorithm, AlgorithmRound, AlgorithmSetup, RoundEnd, Tensors
from fedtune.algorithms._classifiers import find_last_layer, require_classes
from fedtune.algorithms._parameters import copy_parameters
from fedtune.errors import ModelError, RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe

__all__ = ["Moon", "compute_contrast"]


class Moon(Algorithm):
    """Contrasts representations with those of the received and of the earlier model."""

    name: ClassVar[str] = "moon"
    copies: ClassVar[int] = 2
    remembers: ClassVar[bool] = True
    mu: float = Field(1.0, ge=0, description="weight of the contrastive term")
    temperature: float = Field(0.5, gt=0, description="tau")

    def check(self, recipe: Recipe, pipeline: MergePipeline) -> None:
        """Raise RecipeError for tasks without classes, and for a base that moves beneath the earlier model."""
        require_classes(self.name, recipe)
        if pipeline.combine.update_kind == "pairs and base":
            raise RecipeError(
                f"federation.algorithm: moon keeps a client's trained tensors, and {pipeline.combine.name} rewrites "
                "the base beneath them; merge by mean or fedit"
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise ModelError unless the model ends in a linear layer."""
        find_last_layer(self.name, model)

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Keep the received values, and read those of the earlier model."""
        return _MoonRound(self, setup)


class _MoonRound(AlgorithmRound):
    def __init__(self, method: Moon, setup: AlgorithmSetup) -> None:
        self._method, self._setup = method, setup
        self._start = copy_parameters(setup.parameters)
        parameters = dict(setup.model.named_parameters())
        self._earlier = {
            name: one.to(parameters[name].device, parameters[name].dtype) for name, one in setup.stored.items()
        }
        self._inputs: list[Tensor] = []

    @contextmanager
    def change_model(self) -> Iterator[None]:
        """Collect what enters the last layer."""

        def collect_input(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._inputs.append(given[0])

        handle = find_last_layer(self._method.name, self._setup.model).register_forward_pre_hook(collect_input)
        try:
            yield
        finally:
            handle.remove()

    def compute_batch_terms(self, batch: Tensors) -> list[Tensor]:
        """Return the contrast; nothing without an earlier model."""
        own = self._take()
        if not self._earlier or not self._method.mu:
            return []
        received, earlier = (self._represent(batch, one) for one in (self._start, self._earlier))
        return [self._method.mu * compute_contrast(own, received, earlier, self._method.temperature)]

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Store the trained values."""
        trained = {name: one.cpu().to(delta[name].dtype) + delta[name] for name, one in self._start.items()}
        return RoundEnd({}, {**self._setup.stored, **trained})

    @torch.no_grad()
    def _represent(self, batch: Tensors, values: Tensors) -> Tensor:
        model = self._setup.model
        training = model.training
        model.eval()
        functional_call(model, dict(values), kwargs={name: one for name, one in batch.items() if name != "labels"})
        model.train(training)
        return self._take()

    def _take(self) -> Tensor:
        """Return the newest input of the last layer."""
        found = self._inputs[-1]
        self._inputs.clear()
        if found.dim() != 2:
            raise ModelError(
                f"federation.algorithm: moon compares one vector per example, and the last layer of "
                f"{type(self._setup.model).__name__} sees {found.dim()} dimensions; take fedprox or scaffold"
            )
        return found


def compute_contrast(own: Tensor, received: Tensor, earlier: Tensor, temperature: float) -> Tensor:
    """Return the mean over examples of -log(e^(s_g / tau) / (e^(s_g / tau) + e^(s_p / tau)))."""
    near, far = (cosine_similarity(own, other) / temperature for other in (received, earlier))
    return (torch.logaddexp(near, far) - near).mean()
