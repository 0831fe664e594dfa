"""Techniques make fine-tuning fit a device. Each technique is one file; a family with helpers is a folder.

``build_techniques`` builds the techniques of a recipe; the other functions call their hooks in order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations

from torch import Tensor, nn

from fedtune.errors import ModelError, RecipeError
from fedtune.models.paging.paged_layers import replace_paged_layers
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.tasks import Task
from fedtune.techniques._layers.unfrozen_batch_norm import UnfrozenBatchNorm2d, list_running_statistics
from fedtune.techniques._local_tensors import keep_tensors, list_kept_tensors, list_local_tensors
from fedtune.techniques._loss_terms import collect_loss_terms
from fedtune.techniques._saving import refuse_saving
from fedtune.techniques._technique import ExtraPayload, StepEstimator, StepInfo, Technique, list_head_parameters
from fedtune.techniques.zeroth_order._seed_sum import (
    expand_seed_sum,
    list_coefficients,
    list_rebuilt_tensors,
    rebuild_weights,
)
from fedtune.wire.client_update import LowRankPair, TensorSpec

__all__ = [
    "ExtraPayload",
    "StepEstimator",
    "StepInfo",
    "Technique",
    "UnfrozenBatchNorm2d",
    "after_aggregation",
    "apply_techniques",
    "before_optimiser_step",
    "begin_round",
    "begin_step",
    "build_techniques",
    "check_device_type",
    "check_paged_base",
    "collect_loss_terms",
    "collect_metrics",
    "compute_extra_payload",
    "declare_extra_payload",
    "expand_seed_sum",
    "keep_tensors",
    "list_head_parameters",
    "list_kept_tensors",
    "list_local_tensors",
    "list_low_rank_pairs",
    "list_rebuilt_tensors",
    "list_trainable_tensors",
    "make_step_estimator",
    "merge_into_weights",
    "rebuild_weights",
]


def build_techniques(units: Sequence[Unit], recipe_key: str = "train.techniques") -> tuple[Technique, ...]:
    """Return the techniques that a recipe names, in order; RecipeError for wrong settings or combinations."""
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


def check_device_type(techniques: Sequence[Technique], device_type: str) -> None:
    """Raise ModelError if a technique cannot compute on this type of device."""
    for technique in techniques:
        if why := technique.unsupported_devices.get(device_type):
            raise ModelError(f"{technique.name} cannot run on {device_type}, {why}; compute on the CPU")


def check_paged_base(techniques: Sequence[Technique]) -> None:
    """Raise ModelError if a technique needs the matrices of the base in memory."""
    for technique in techniques:
        if technique.paged_base_problem is not None:
            raise ModelError(
                f"model.paged: {technique.name} {technique.paged_base_problem}; take lora or meft, or drop model.paged"
            )


def apply_techniques(techniques: Sequence[Technique], model: nn.Module, task: Task, seed: int) -> list[str]:
    """Freeze the model, let each technique rewrite it, and return the names of all tensors that may be trained.

    The model is ready for round 1. If layers were replaced, ``save_pretrained`` refuses until ``merge_into_weights``.
    """
    plain = set(model.state_dict())
    model.requires_grad_(False)
    for technique in techniques:
        technique.rewrite_model(model, task, seed)
    shared: set[str] = set()
    for round_number in (1, 2):
        begin_round(techniques, model, round_number)
        shared.update(list_trainable_tensors(model))
    for technique in techniques:
        shared.update(technique.list_server_held_tensors(model))
    begin_round(techniques, model, 1)
    if set(model.state_dict()) != plain:
        refuse_saving(model, [one.name for one in techniques if type(one)._fold is not Technique._fold])
    return sorted(shared)


def merge_into_weights(techniques: Sequence[Technique], model: nn.Module) -> None:
    """Merge all that was trained into plain layers, which ``save_pretrained`` can save."""
    for technique in techniques:
        technique.merge_into_weights(model)
    replace_paged_layers(model)


def begin_round(techniques: Sequence[Technique], model: nn.Module, round_number: int) -> None:
    """Let each technique choose what is trained in round 1, 2, ..."""
    for technique in techniques:
        technique.begin_round(model, round_number)


def begin_step(techniques: Sequence[Technique], model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
    """Pass the inputs of the next step, and the share 0..1 of the run that is completed, to each technique."""
    for technique in techniques:
        technique.begin_step(model, batch, progress)


def before_optimiser_step(techniques: Sequence[Technique], model: nn.Module, step_info: StepInfo) -> float:
    """Let each technique change the gradients of a step. Return the learning rate of the step."""
    for technique in techniques:
        step_info = step_info._replace(lr=technique.before_optimiser_step(model, step_info))
    return step_info.lr


def make_step_estimator(
    techniques: Sequence[Technique], model: nn.Module, masters: Mapping[str, nn.Parameter], seed: int
) -> StepEstimator | None:
    """Return what takes the steps of a round without a backward pass; None for ordinary steps."""
    made = (technique.make_step_estimator(model, masters, seed) for technique in techniques)
    return next((one for one in made if one is not None), None)


def list_low_rank_pairs(techniques: Sequence[Technique], model: nn.Module) -> list[LowRankPair]:
    """Return the low-rank pairs in the model."""
    return [pair for technique in techniques for pair in technique.list_low_rank_pairs(model)]


def declare_extra_payload(
    techniques: Sequence[Technique], model: nn.Module, round_number: int
) -> dict[str, TensorSpec]:
    """Return the extra tensors that techniques require in client updates in a round."""
    return {
        name: form
        for technique in techniques
        for name, form in technique.declare_extra_payload(model, round_number).items()
    }


def compute_extra_payload(
    techniques: Sequence[Technique], model: nn.Module, round_number: int, run_backward: Callable[[], None]
) -> dict[str, Tensor]:
    """Return the extra tensors of a client's update. ``run_backward`` computes the gradients of one batch."""
    return {
        name: tensor
        for technique in techniques
        for name, tensor in technique.compute_extra_payload(model, round_number, run_backward).items()
    }


def after_aggregation(
    techniques: Sequence[Technique],
    state: Mapping[str, Tensor],
    round_number: int,
    extra_payloads: Sequence[ExtraPayload],
) -> dict[str, Tensor]:
    """Return the merged state after each technique has changed it, given the extra payloads of the clients."""
    revised = dict(state)
    for technique in techniques:
        revised = technique.after_aggregation(revised, round_number, extra_payloads)
    return revised


@contextmanager
def collect_metrics(techniques: Sequence[Technique], model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Collect metrics of techniques while examples are evaluated in the block. The yielded function returns them."""
    with ExitStack() as stack:
        taken = [stack.enter_context(technique.collect_metrics(model)) for technique in techniques]
        yield lambda: {name: value for figures in taken for name, value in figures().items()}


def list_trainable_tensors(model: nn.Module) -> list[str]:
    """Return the names of the tensors that are trained and sent now.

    These are parameters, updated running statistics, and the scalars of directions.
    """
    parameters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = set(list_local_tensors(model))
    return [
        *(name for name in (*parameters, *list_running_statistics(model)) if name not in kept),
        *list_coefficients(model),
    ]
