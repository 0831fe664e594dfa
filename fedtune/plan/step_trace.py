"""Run the product's own training step on tensors without data, and count the storages that it would hold."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedtune import continual, techniques
from fedtune.errors import ModelError
from fedtune.memory import StorageMeter
from fedtune.models.blocks.choice import make_block_skeleton
from fedtune.models.blocks.configuration import UnknownBlocksError
from fedtune.models.blocks.preference import prefers_plain_blocks
from fedtune.models.image_model_files import is_fedtune_image_model
from fedtune.models.paging.page_layers import list_pageable_layers
from fedtune.models.skeleton import make_skeleton
from fedtune.models.sources import locate_model
from fedtune.plan.block_lists import FEWEST_BLOCKS, BlockList, find_like_blocks, truncate_blocks
from fedtune.plan.data_answers import DataAnswers
from fedtune.plan.library_patches import patch_libraries
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.tasks import get_task
from fedtune.techniques import Technique, begin_round, begin_step, list_trainable_tensors, make_step_estimator
from fedtune.training import compute_step_loss, get_tensor_shapes, set_train_mode
from fedtune.training.kept_tensors import mark_kept_tensors
from fedtune.training.plain_blocks import find_blocks_problem
from fedtune.training.step_gradients import compute_gradients

__all__ = ["RoundTrace", "TracedModel", "build_traced_model", "trace_rounds", "use_fake_tensors"]

_Of = TypeVar("_Of")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RoundTrace:
    """What a step of a round holds and computes. ``trained`` are the names of the tensors that it trains and sends.

    ``step_bytes`` is the peak with gradients of parameters, which grow while what is kept for them is freed, and
    ``gradient_bytes`` what these hold at the end.
    """

    kept_bytes: int
    peak_bytes: int
    step_bytes: int
    gradient_bytes: int
    flops: int
    trained: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class TracedModel:
    """A model without data, rewritten by techniques.

    ``blocks`` is the list that was shortened, None if none was, and ``depth`` the number of blocks that are left.
    ``blocks_problem`` says why transformers builds the model of a text after all, None if it is made of plain blocks.
    ``paged`` are the weights that stay in a file.
    """

    model: nn.Module = field(repr=False)
    techniques: tuple[Technique, ...]
    shared: list[str] = field(repr=False)
    blocks: BlockList | None
    depth: int
    blocks_problem: str | None = None
    paged: tuple[nn.Parameter, ...] = field(default=(), repr=False)

    def expand_names(self, values: Mapping[str, _Of]) -> dict[str, _Of]:
        """Return the entries of all blocks of the full depth from those of the blocks that are left."""
        return dict(values) if self.blocks is None else self.blocks.expand_names(values)

    def expand_all(self, names: Iterable[str]) -> list[str]:
        """Return the names at the full depth."""
        return list(self.expand_names(dict.fromkeys(names)))


@contextmanager
def use_fake_tensors() -> Iterator[DataAnswers]:
    """Tensors that are made inside the block have sizes and no data."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with patch_libraries(), torch.random.fork_rng(devices=[]), fakes, DataAnswers() as answers:
        yield answers


def build_traced_model(recipe: Recipe, labels: Sequence[str], more: int | None) -> TracedModel:
    """Build the recipe's model as ``prepare_model`` does, without weights, with ``more`` than the fewest of its blocks.

    All blocks are built if there is no list of like blocks, if it has no more, or without ``more``.
    """
    chosen, task = techniques.build_techniques(recipe.train.techniques), get_task(recipe.task)
    if recipe.model.paged:
        techniques.check_paged_base(chosen)
    model, problem = _make_model(recipe, labels, chosen)
    blocks, depth = None if more is None else find_like_blocks(model), 0
    if blocks is not None and more is not None:
        fewest, shallow = _find_fewest(chosen, blocks.count)
        depth = fewest + more
        blocks = blocks if depth < blocks.count else None
    if blocks is not None:
        truncate_blocks(model, blocks, depth)
        chosen = shallow
    paged = _find_paged(recipe, model)
    for method in continual.list_methods(recipe):
        method.rewrite_model(model, task, recipe)
    trained = techniques.apply_techniques(chosen, model, task, derive_seed(recipe.seed, "techniques"))
    shared = mark_kept_tensors(recipe, model, chosen, trained)
    return TracedModel(model, chosen, shared, blocks, depth, problem, paged)


def _make_model(recipe: Recipe, labels: Sequence[str], chosen: Sequence[Technique]) -> tuple[nn.Module, str | None]:
    """Return the model that a trainer would build, and why transformers must build it.

    A process that prefers plain blocks takes them where a device's trainer does.
    """
    task, problem = get_task(recipe.task), None
    if prefers_plain_blocks() and not is_fedtune_image_model(location := locate_model(recipe.model)):
        try:
            reason = find_blocks_problem(recipe, chosen)
            return make_block_skeleton(recipe.model, location, task, labels, problem=reason), None
        except UnknownBlocksError as error:
            problem = str(error)
    quantised = [found for found in (technique.make_quantisation_config() for technique in chosen) if found is not None]
    if len(quantised) > 1:
        raise ModelError("two techniques want to quantise the base; keep one of them")
    seed, quantisation = derive_seed(recipe.seed, "head"), next(iter(quantised), None)
    return make_skeleton(recipe.model, task, labels, seed=seed, quantisation=quantisation), problem


def _find_paged(recipe: Recipe, model: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return the weights that stay in a file: those of plain layers, but not of a new head."""
    if not recipe.model.paged or is_fedtune_image_model(locate_model(recipe.model)):
        return ()
    prefix = f"{getattr(model, 'base_model_prefix', '')}." if get_task(recipe.task).has_new_head else ""
    return tuple(model.get_parameter(f"{name}.weight") for name in list_pageable_layers(model, prefix))


def _find_fewest(chosen: Sequence[Technique], count: int) -> tuple[int, tuple[Technique, ...]]:
    """Return the fewest blocks that stand for ``count`` and the techniques as they are traced; ``count`` if none do."""
    for fewest in FEWEST_BLOCKS:
        shallow = [technique.for_depth(count, fewest) for technique in chosen]
        if None not in shallow:
            return fewest, tuple(technique for technique in shallow if technique is not None)
    return count, tuple(chosen)


def trace_rounds(
    traced: TracedModel, recipe: Recipe, labels: Sequence[str], batch_size: int, answers: DataAnswers
) -> list[RoundTrace]:
    """Trace a step on ``batch_size`` examples: of round 1, and of round 2 if it trains other tensors."""
    train = recipe.train.model_copy(update={"batch_size": batch_size})
    sized, task = recipe.model_copy(update={"train": train}), get_task(recipe.task)
    batch = task.make_random_batch(traced.model, sized, len(labels), torch.Generator().manual_seed(0))
    found: list[RoundTrace] = []
    for number in (1, 2):
        begin_round(traced.techniques, traced.model, number)
        trained = tuple(list_trainable_tensors(traced.model))
        if not found or found[0].trained != trained:
            found.append(_trace_step(traced, recipe, batch, trained, answers))
    begin_round(traced.techniques, traced.model, 1)
    return found


def _trace_step(
    traced: TracedModel, recipe: Recipe, batch: Mapping[str, Tensor], trained: tuple[str, ...], answers: DataAnswers
) -> RoundTrace:
    """Measure as ``fedtune profile`` does: bytes kept when the forward pass ends, and the peak of both passes."""
    model, before = traced.model, answers.flops
    set_train_mode(model)
    estimator, kept = make_step_estimator(traced.techniques, model, {}, recipe.seed), list[int]()

    def compute_loss() -> Tensor:
        loss = compute_step_loss(get_task(recipe.task), model, batch)
        kept.append(meter.current_bytes)
        return loss

    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        begin_step(traced.techniques, model, batch, 0.0)
        compute_gradients(compute_loss, estimator)
        gradients = meter.gradient_bytes
    model.zero_grad()
    return RoundTrace(
        max(kept), meter.peak_bytes, meter.peak_with_gradients, gradients, answers.flops - before, trained
    )


def list_shapes(traced: TracedModel) -> Shapes:
    """Return the shapes of all tensors of the model at its full depth."""
    return traced.expand_names(get_tensor_shapes(traced.model))
