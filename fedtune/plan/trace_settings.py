"""Trace one candidate: the techniques on the recipe's model, at one example and at the whole batch."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from fedtune.algorithms import count_copies
from fedtune.errors import FedtuneError
from fedtune.models.image_model_files import is_fedtune_image_model
from fedtune.models.sources import resolve_model_source
from fedtune.plan.candidates import Candidate
from fedtune.plan.data_answers import DataAnswers
from fedtune.plan.depth import ModelTrace, trace_model
from fedtune.plan.settings_trace import BatchTrace, SettingsTrace
from fedtune.plan.step_trace import RoundTrace, TracedModel, use_fake_tensors
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.techniques import list_kept_tensors, list_rebuilt_tensors
from fedtune.training.micro_batches import can_split_batch
from fedtune.wire.tensor_payload import packed_size

__all__ = ["trace_candidate"]

_BYTES = 4


def trace_candidate(recipe: Recipe, labels: Sequence[str], candidate: Candidate) -> SettingsTrace:
    """Return the figures, or why the candidate cannot be used. Call it in a process that only plans."""
    wanted = _apply(recipe, candidate)
    start = SettingsTrace(
        techniques=[unit.model_dump(mode="json") for unit in candidate.techniques], dtype=candidate.dtype
    )
    try:
        with use_fake_tensors() as answers:
            return start.model_copy(update=_trace(wanted, labels, answers))
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


def _trace(recipe: Recipe, labels: Sequence[str], answers: DataAnswers) -> dict[str, Any]:
    """Return the fields of the trace."""
    trace = trace_model(recipe, labels, _list_sizes(recipe), answers)
    traced, size = trace.model, recipe.train.batch_size
    may_split = can_split_batch(get_task(recipe.task), traced.model)
    batches = [
        _join(examples, rounds) for examples, rounds in zip(_list_sizes(recipe), trace.by_batch_size, strict=True)
    ]
    return {
        "batches": batches if may_split else [one for one in batches if one.examples == size],
        "traced_blocks": trace.traced_blocks,
        "runtime": _name_runtime(recipe, traced),
        "exact_gradients": all(technique.has_exact_gradients for technique in traced.techniques),
        "needs_gradients": not any(technique.estimates_gradients for technique in traced.techniques),
        "shapes": {name: list(trace.shapes[name]) for name in _expand(traced, traced.shared)},
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
        flops=max(one.flops for one in rounds),
    )


def _expand(traced: TracedModel, names: Sequence[str]) -> list[str]:
    return list(names) if traced.blocks is None else traced.blocks.expand_all(names)


def _count_bytes(recipe: Recipe, trace: ModelTrace) -> dict[str, int]:
    """Count weights by where they lie, trained values, and what a round sends in each direction."""
    traced, shapes = trace.model, trace.shapes
    rounds = [one.trained for one in trace.by_batch_size[0]]
    kept = _expand(traced, list_kept_tensors(traced.model))  # trained and not sent
    counts = [sum(prod(shapes[name]) for name in (*names, *kept)) for names in rounds]
    sizes = _list_storages(traced)
    rebuilt = set(list_rebuilt_tensors(traced.model))
    trainable = {name for names in (*rounds, kept) for name in names} | rebuilt
    mapped = _find_mapped(recipe, traced, sizes, trainable)
    halves = {torch.bfloat16, torch.float16}
    copied = count_copies(recipe) * max(counts)
    mastered = max(sum(prod(shapes[name]) for name in names if _dtypes(traced).get(name) in halves) for names in rounds)
    shared = _make_payload(traced, shapes, _expand(traced, traced.shared))
    return {
        "trained_values": max(counts),
        "master_values": mastered + copied,
        "mapped_bytes": sum(sizes[name] for name in mapped),
        "weight_bytes": sum(size for name, size in sizes.items() if name not in mapped),
        "shared_bytes": sum(prod(shapes[name]) for name in _expand(traced, traced.shared)) * _BYTES,
        "up_bytes": max(packed_size(_make_payload(traced, shapes, names)) for names in rounds),
        "down_bytes": packed_size(shared),
    }


def _dtypes(traced: TracedModel) -> dict[str, torch.dtype]:
    found = {name: tensor.dtype for name, tensor in _named(traced.model).items()}
    return found if traced.blocks is None else traced.blocks.expand_names(found)


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _list_storages(traced: TracedModel) -> dict[str, int]:
    """Return the bytes of each tensor's storage by name; tied weights count once."""
    found: dict[str, int] = {}
    for name, tensor in _named(traced.model).items():
        found[name] = tensor.untyped_storage().nbytes() + _count_quantisation_bytes(tensor)
    return found if traced.blocks is None else traced.blocks.expand_names(found)


def _count_quantisation_bytes(tensor: torch.Tensor) -> int:
    """The scales of a four-bit weight. All weights share the table of the scales' own codes."""
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return 0
    own = (state.absmax, state.code, state.offset, state.state2.absmax)
    return sum(one.untyped_storage().nbytes() for one in own)


def _find_mapped(recipe: Recipe, traced: TracedModel, sizes: Mapping[str, int], trainable: set[str]) -> set[str]:
    """Return the weights that are read in place: transformers maps files whose weights need no cast.

    A weight that is trained is copied when it is written.
    """
    location = resolve_model_source(recipe.model.source)
    if is_fedtune_image_model(location) or recipe.model.dtype != "float32":
        return set()
    dtypes = _dtypes(traced)
    added = (".lora_", ".adapters.", "fedkseed.")
    return {
        name
        for name in sizes
        if name not in trainable and dtypes[name] == torch.float32 and not any(part in name for part in added)
    }


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


def _name_runtime(recipe: Recipe, traced: TracedModel) -> str:
    """Name the libraries that a process of these settings imports, and the model whose tokenizer it holds."""
    names = {technique.name for technique in traced.techniques}
    if is_fedtune_image_model(resolve_model_source(recipe.model.source)) and "lora" not in names:
        return "torch"
    return f"transformers {recipe.model.source}" if get_task(recipe.task).reads_text else "transformers"
