"""What the recipe's algorithm does on the server: it weighs updates, corrects the state, and keeps its memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fedtune import algorithms
from fedtune.algorithms import MergedUpdates, ServerResult, Weighing, find_algorithm
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.training import RunContext
from fedtune.wire.client_update import ClientUpdate, TensorSpec

__all__ = [
    "check_algorithm_model",
    "correct_merged_state",
    "declare_algorithm_upload",
    "list_sent_algorithm_memory",
    "scale_updates",
]

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def check_algorithm_model(context: RunContext) -> None:
    """Raise ModelError if the recipe's algorithm does not fit the model."""
    algorithm = find_algorithm(context.recipe)
    if algorithm is not None:
        algorithm.check_model(context.model)


def declare_algorithm_upload(recipe: Recipe, model: nn.Module, shapes: Shapes) -> dict[str, TensorSpec]:
    """Return what clients add to their updates; ``shapes`` are those of the deltas."""
    algorithm = find_algorithm(recipe)
    if algorithm is None:
        return {}
    found = algorithm.declare_upload(_select_parameters(model, shapes))
    return {f"{algorithm.name}/{name}": form for name, form in found.items()}


def list_sent_algorithm_memory(context: RunContext, memory: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
    """Return what clients receive of the algorithm's memory in a round that trains ``names``, by its name."""
    algorithm = find_algorithm(context.recipe)
    if algorithm is None or not memory:
        return {}
    sent = algorithm.list_sent_memory(memory, names)
    return algorithms.name_tensors(algorithm, {name: memory[name] for name in sent})


def scale_updates(
    recipe: Recipe, pipeline: MergePipeline, updates: Sequence[ClientUpdate], shapes: Shapes
) -> list[ClientUpdate]:
    """Return the updates in client order, with the weights that the algorithm gives them."""
    ordered = sorted(updates, key=lambda one: one.client)
    algorithm = find_algorithm(recipe)
    if algorithm is None or not ordered:
        return ordered
    if algorithm.weighs_equally:
        ordered = [replace(one, num_examples=1) for one in ordered]
    weights = pipeline.combine.compute_client_weights([one.num_examples for one in ordered])
    scales = algorithm.compute_scales(Weighing(recipe, shapes, ordered, weights))
    return [replace(one, scale=one.scale * scale) for one, scale in zip(ordered, scales, strict=True)]


def correct_merged_state(
    context: RunContext,
    before: Tensors,
    after: Tensors,
    updates: Sequence[ClientUpdate],
    shapes: Shapes,
    memory: Tensors,
) -> ServerResult:
    """Return the next state and the algorithm's memory; both as they are without an algorithm."""
    algorithm = find_algorithm(context.recipe)
    if algorithm is None:
        return ServerResult(after, {})
    parameters = _select_parameters(context.model, shapes)
    return algorithm.after_merge(MergedUpdates(before, after, parameters, updates, memory, context.recipe.num_clients))


def _select_parameters(model: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters; running statistics of batch norms are left out."""
    known = dict(model.named_parameters())
    return {name: shape for name, shape in shapes.items() if name in known}
