"""Trace one candidate: the techniques on the recipe's model, at one example and at the whole batch."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from fedtune.algorithms import count_copies
from fedtune.errors import FedtuneError
from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.image_model_files import is_fedtune_image_model
from fedtune.models.paging.paged_matrix import LARGEST_PIECE
from fedtune.models.paging.streamed_loss import CHUNK_ROWS
from fedtune.models.sources import locate_model
from fedtune.plan.candidates import Candidate
from fedtune.plan.depth import ModelTrace, trace_model
from fedtune.plan.mapped_weights import find_mapped_weights
from fedtune.plan.sent_bytes import count_received_bytes, count_uploaded_bytes
from fedtune.plan.settings_trace import BatchTrace, SettingsTrace
from fedtune.plan.step_trace import RoundTrace, TracedModel, use_fake_tensors
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.techniques import list_kept_tensors, list_rebuilt_tensors
from fedtune.training.micro_batches import can_split_batch

__all__ = ["trace_candidate"]

_BYTES = 4


def trace_candidate(
    recipe: Recipe, labels: Sequence[str], candidate: Candidate, *, has_conversations: bool = False
) -> SettingsTrace:
    """Return the figures, or why the candidate cannot be used. Call it in a process that only plans.

    The model is of plain blocks if the process prefers them and a trainer would build it of them. The tokenizer that
    writes conversations comes from transformers even then.
    """
    wanted = _apply(recipe, candidate)
    start = SettingsTrace(
        techniques=[unit.model_dump(mode="json") for unit in candidate.techniques], dtype=candidate.dtype
    )
    try:
        locate_model(wanted.model)  # what it makes in the cache has data
        with use_fake_tensors() as answers:
            trace = trace_model(wanted, labels, _list_sizes(wanted), answers)
            runtime = _name_runtime(wanted, trace.model, has_conversations=has_conversations)
            return start.model_copy(update={"runtime": runtime, **_describe_trace(wanted, trace)})
    except FedtuneError as error:
        return start.model_copy(update={"error": str(error)})
    except Exception as error:  # a model that does not run without data
        return start.model_copy(update={"error": _describe_error(error)})


def _describe_error(error: Exception) -> str:
    first = " ".join(str(error).partition("\n")[0].split())
    return f"its step cannot be traced without data ({type(error).__name__}: {first}); measure it with fedtune profile"


def _apply(recipe: Recipe, candidate: Candidate) -> Recipe:
    train = recipe.train.model_copy(update={"techniques": list(candidate.techniques), "device": "cpu"})
    model = recipe.model.model_copy(update={"dtype": candidate.dtype})
    return recipe.model_copy(update={"train": train, "model": model})


def _describe_trace(recipe: Recipe, trace: ModelTrace) -> dict[str, Any]:
    """Return the fields of the trace."""
    traced, size = trace.model, recipe.train.batch_size
    may_split = can_split_batch(get_task(recipe.task), traced.model)
    batches = [
        _join(examples, rounds) for examples, rounds in zip(_list_sizes(recipe), trace.by_batch_size, strict=True)
    ]
    return {
        "batches": batches if may_split else [one for one in batches if one.examples == size],
        "traced_blocks": trace.traced_blocks,
        "blocks_problem": traced.blocks_problem,
        "exact_gradients": all(technique.has_exact_gradients for technique in traced.techniques),
        "needs_gradients": not any(technique.estimates_gradients for technique in traced.techniques),
        "shapes": {name: list(trace.shapes[name]) for name in traced.expand_all(traced.shared)},
        **_count_bytes(recipe, trace),
    }


def _list_sizes(recipe: Recipe) -> list[int]:
    return sorted({1, recipe.train.batch_size})


def _join(examples: int, rounds: Sequence[RoundTrace]) -> BatchTrace:
    """Return the larger figure of each kind."""
    return BatchTrace(
        examples=examples,
        kept_bytes=max(one.kept_bytes for one in rounds),
        peak_bytes=max(one.peak_bytes for one in rounds),
        step_bytes=max(one.step_bytes for one in rounds),
        flops=max(one.flops for one in rounds),
    )


def _count_bytes(recipe: Recipe, trace: ModelTrace) -> dict[str, int]:
    """Count weights by where they lie, trained values, and what a round sends in each direction."""
    traced, shapes = trace.model, trace.shapes
    rounds = [one.trained for one in trace.by_batch_size[0]]
    kept = traced.expand_all(list_kept_tensors(traced.model))  # trained and not sent
    counts = [sum(prod(shapes[name]) for name in (*names, *kept)) for names in rounds]
    sizes = _list_storages(traced)
    rebuilt = set(list_rebuilt_tensors(traced.model))
    trainable = {name for names in (*rounds, kept) for name in names} | rebuilt
    paged = set(traced.expand_all(_list_paged(traced)))
    parameters = traced.expand_names({name: one.dtype for name, one in traced.model.named_parameters()})
    mapped = find_mapped_weights(recipe.model, parameters) - trainable
    halves = {torch.bfloat16, torch.float16}
    copied = count_copies(recipe) * max(counts)
    mastered = max(sum(prod(shapes[name]) for name in names if _dtypes(traced).get(name) in halves) for names in rounds)
    shared = _make_payload(traced, shapes, traced.expand_all(traced.shared))
    return {
        "trained_values": max(counts),
        "master_values": mastered + copied,
        "mapped_bytes": sum(sizes[name] for name in mapped),
        "weight_bytes": sum(size for name, size in sizes.items() if name not in mapped | paged)
        + max((_count_read_bytes(layer, traced) for layer in traced.model.modules()), default=0),
        "shared_bytes": sum(prod(shapes[name]) for name in traced.expand_all(traced.shared)) * _BYTES,
        "up_bytes": max(count_uploaded_bytes(recipe, traced, _make_payload(traced, shapes, names)) for names in rounds),
        "down_bytes": max(count_received_bytes(recipe, shared, names) for names in rounds),
    }


def _dtypes(traced: TracedModel) -> dict[str, torch.dtype]:
    found = {name: tensor.dtype for name, tensor in _named(traced.model).items()}
    return traced.expand_names(found)


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _list_storages(traced: TracedModel) -> dict[str, int]:
    """Return the bytes of each tensor's storage by name; tied weights count once."""
    found: dict[str, int] = {}
    for name, tensor in _named(traced.model).items():
        found[name] = tensor.untyped_storage().nbytes() + _count_quantisation_bytes(tensor)
    return traced.expand_names(found)


def _list_paged(traced: TracedModel) -> list[str]:
    """Return the weights that stay in a file. Layers that share one have it under two names."""
    named = traced.model.named_parameters(remove_duplicate=False)
    paged = {id(one) for one in traced.paged}
    return [name for name, one in named if id(one) in paged]


def _count_read_bytes(layer: nn.Module, traced: TracedModel) -> int:
    """Return the bytes of the buffer into which a layer reads its matrix from a store.

    A head inside the loss reads few rows at a time, and an embedding those of its batch into a tensor of their own.
    """
    weight = layer._parameters.get("weight")
    if weight is None or isinstance(layer, nn.Embedding) or all(weight is not one for one in traced.paged):
        return 0
    rows = len(weight) if type(layer) is nn.Linear else min(len(weight), CHUNK_ROWS)
    return min(LARGEST_PIECE, rows * weight.shape[1] * weight.element_size())


def _count_quantisation_bytes(tensor: torch.Tensor) -> int:
    """The scales of a four-bit weight. All weights share the table of the scales' own codes."""
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return 0
    own = (state.absmax, state.code, state.offset, state.state2.absmax)
    return sum(one.untyped_storage().nbytes() for one in own)


def _make_payload(
    traced: TracedModel, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return tensors without data of what is sent: numbers in single precision."""
    dtypes = _dtypes(traced)
    return {
        name: torch.empty(
            shapes[name], dtype=torch.float32 if dtypes[name].is_floating_point else dtypes[name], device="meta"
        )
        for name in names
    }


def _name_runtime(recipe: Recipe, traced: TracedModel, *, has_conversations: bool) -> str:
    """Name the libraries that a process of these settings imports, and the model whose tokenizer it loads."""
    names = {technique.name for technique in traced.techniques}
    if isinstance(traced.model, BlockModel):
        return f"{'chat' if has_conversations else 'blocks'} {recipe.model.source}"
    if is_fedtune_image_model(locate_model(recipe.model)) and "lora" not in names:
        return "torch"
    return f"transformers {recipe.model.source}" if get_task(recipe.task).reads_text else "transformers"
