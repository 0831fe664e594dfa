"""The bytes that a round sends in each direction, from the shapes of what is trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune import merging, techniques
from fedtune.algorithms import find_algorithm, name_tensors
from fedtune.plan.step_trace import TracedModel
from fedtune.recipe.schema import Recipe
from fedtune.training.uploaded_statistics import declare_uploaded_statistics
from fedtune.wire.client_update import TensorSpec
from fedtune.wire.memory_names import add_memory
from fedtune.wire.tensor_payload import packed_size

__all__ = ["count_received_bytes", "count_uploaded_bytes"]

Tensors = Mapping[str, Tensor]
_ROUNDS = range(1, 65)
"""The rounds that are looked at: some techniques send more every few rounds."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "U8": torch.uint8}


def count_uploaded_bytes(recipe: Recipe, traced: TracedModel, deltas: Tensors) -> int:
    """Return the packed bytes of an update in the largest round: ``deltas``, and what is sent beside them."""
    beside = {**_list_statistics(recipe, traced, deltas), **_list_algorithm_tensors(recipe, traced, deltas)}
    return max(packed_size({**deltas, **beside, **extras}) for extras in _list_extras(traced))


def count_received_bytes(recipe: Recipe, shared: Tensors, trained: Sequence[str]) -> int:
    """Return the packed bytes of the state, and of the server's memory that an algorithm sends beside it.

    The memory has a tensor for each trained one, as from the second round on.
    """
    algorithm = find_algorithm(recipe)
    if algorithm is None:
        return packed_size(shared)
    memory = {name: shared[name] for name in trained if name in shared}
    sent = {name: memory[name] for name in algorithm.list_sent_memory(memory, trained)}
    return packed_size(add_memory(shared, name_tensors(algorithm, sent)))


def _list_extras(traced: TracedModel) -> list[dict[str, Tensor]]:
    """Return the distinct sets of tensors that techniques add to an update, by round."""
    found: dict[str, dict[str, Tensor]] = {}
    for number in _ROUNDS:
        forms = techniques.declare_extra_payload(traced.techniques, traced.model, number)
        found.setdefault(repr(forms), _make_tensors(traced.expand_names(forms)))
    return list(found.values())


def _list_statistics(recipe: Recipe, traced: TracedModel, deltas: Tensors) -> dict[str, Tensor]:
    """Return the activation statistics that a merge asks of clients: two tensors over all weights."""
    forms = declare_uploaded_statistics(traced.model, recipe, set(deltas))
    if not forms:
        return {}
    places = {name: one.size for name, one in merging.find_input_channels(traced.model, set(deltas)).items()}
    sizes = traced.expand_names(places)
    whole = zip(forms.items(), (sum(sizes.values()), len(sizes)), strict=True)
    return _make_tensors({name: form._replace(shape=(count,)) for (name, form), count in whole})


def _list_algorithm_tensors(recipe: Recipe, traced: TracedModel, deltas: Tensors) -> dict[str, Tensor]:
    """Return what ``federation.algorithm`` adds for the parameters among the deltas."""
    algorithm = find_algorithm(recipe)
    if algorithm is None:
        return {}
    parameters = traced.expand_names(dict(traced.model.named_parameters()))
    trained = {name: tuple(delta.shape) for name, delta in deltas.items() if name in parameters}
    return name_tensors(algorithm, _make_tensors(algorithm.declare_upload(trained)))


def _make_tensors(forms: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    return {name: torch.empty(one.shape, dtype=_DTYPES[one.dtype], device="meta") for name, one in forms.items()}
