"""How it fits a device: one file is one technique. ``build_techniques`` turns a recipe's list into techniques."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations

from torch import Tensor, nn

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.tasks import Task
from fedtune.techniques._live_norm import UnfrozenBatchNorm2d, list_local_tensors, list_running_statistics
from fedtune.techniques._saving import refuse_saving
from fedtune.techniques._technique import ExtraPayload, StepInfo, Technique
from fedtune.techniques._terms import collect_loss_terms
from fedtune.wire.client_update import LowRankPair, TensorSpec

__all__ = [
    "ExtraPayload",
    "StepInfo",
    "Technique",
    "UnfrozenBatchNorm2d",
    "after_aggregation",
    "apply_techniques",
    "before_optimiser_step",
    "begin_round",
    "begin_step",
    "build_techniques",
    "collect_loss_terms",
    "collect_metrics",
    "compute_extra_payload",
    "declare_extra_payload",
    "list_local_tensors",
    "list_low_rank_pairs",
    "list_trainable_tensors",
    "merge_into_weights",
]


def build_techniques(units: Sequence[Unit], recipe_key: str = "train.techniques") -> tuple[Technique, ...]:
    """The techniques named ``recipe_key`` in a recipe, in order; RecipeError for settings or pairs that do not hold."""
    chosen: tuple[Technique, ...] = tuple(build_unit(__name__, unit, recipe_key) for unit in units)
    present = [technique.name for technique in chosen]
    for one, other in permutations(chosen, 2):
        why = one.find_conflict(other)
        if why is not None:
            raise RecipeError(f"{recipe_key}: {one.name} cannot be combined with {other.name}: {why}; drop one")
    if len(set(present)) < len(present):
        raise RecipeError(f"{recipe_key}: {'+'.join(present)} names one technique twice; drop one")
    if not any(technique.selects_trainable_tensors for technique in chosen):
        raise RecipeError(f"{recipe_key}: {'+'.join(present)} trains nothing; add full, lora, bias or head-only")
    return chosen


def apply_techniques(techniques: Sequence[Technique], model: nn.Module, task: Task, seed: int) -> list[str]:
    """Freeze the model, let each technique rewrite it, and return the names of all that may be trained.

    The model is left ready for round 1. Where its layers have changed, ``save_pretrained`` refuses until ``fold``.
    """
    plain = set(model.state_dict())
    model.requires_grad_(False)
    for technique in techniques:
        technique.rewrite_model(model, task, seed)
    shared: set[str] = set()
    for number in (1, 2):
        begin_round(techniques, model, number)
        shared.update(list_trainable_tensors(model))
    for technique in techniques:
        shared.update(technique.list_server_held_tensors(model))
    begin_round(techniques, model, 1)
    if set(model.state_dict()) != plain:
        refuse_saving(model, [one.name for one in techniques if type(one)._fold is not Technique._fold])
    return sorted(shared)


def merge_into_weights(techniques: Sequence[Technique], model: nn.Module) -> None:
    """Write what was learned into plain layers, which ``save_pretrained`` can save."""
    for technique in techniques:
        technique.merge_into_weights(model)


def begin_round(techniques: Sequence[Technique], model: nn.Module, number: int) -> None:
    """Let each technique choose what is trained in round 1, 2, ..."""
    for technique in techniques:
        technique.begin_round(model, number)


def begin_step(techniques: Sequence[Technique], model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
    """Tell each technique the inputs of the step to come and the share 0..1 of the run that is over."""
    for technique in techniques:
        technique.begin_step(model, batch, progress)


def before_optimiser_step(techniques: Sequence[Technique], model: nn.Module, moment: StepInfo) -> float:
    """Let each technique change the gradients of a step; the learning rate they come to."""
    for technique in techniques:
        moment = moment._replace(lr=technique.before_optimiser_step(model, moment))
    return moment.lr


def list_low_rank_pairs(techniques: Sequence[Technique], model: nn.Module) -> list[LowRankPair]:
    """The low-rank pairs in the model."""
    return [pair for technique in techniques for pair in technique.list_low_rank_pairs(model)]


def declare_extra_payload(techniques: Sequence[Technique], model: nn.Module, number: int) -> dict[str, TensorSpec]:
    """What techniques want clients to add to their contributions in a round."""
    return {
        name: form for technique in techniques for name, form in technique.declare_extra_payload(model, number).items()
    }


def compute_extra_payload(
    techniques: Sequence[Technique], model: nn.Module, number: int, run_backward: Callable[[], None]
) -> dict[str, Tensor]:
    """What a client adds to its contribution; ``run_backward`` takes the gradient of one batch."""
    return {
        name: tensor
        for technique in techniques
        for name, tensor in technique.compute_extra_payload(model, number, run_backward).items()
    }


def after_aggregation(
    techniques: Sequence[Technique], state: Mapping[str, Tensor], number: int, extra_payloads: Sequence[ExtraPayload]
) -> dict[str, Tensor]:
    """The merged state of a round, as techniques change it by the clients' answers."""
    revised = dict(state)
    for technique in techniques:
        revised = technique.after_aggregation(revised, number, extra_payloads)
    return revised


@contextmanager
def collect_metrics(techniques: Sequence[Technique], model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Figures that techniques take while held-out examples are scored inside the block."""
    with ExitStack() as stack:
        taken = [stack.enter_context(technique.collect_metrics(model)) for technique in techniques]
        yield lambda: {name: value for figures in taken for name, value in figures().items()}


def list_trainable_tensors(model: nn.Module) -> list[str]:
    """Names of what is trained now and sent: parameters in the model's order, then statistics that follow the data."""
    parameters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = set(list_local_tensors(model))
    return [*(name for name in parameters if name not in kept), *list_running_statistics(model)]
