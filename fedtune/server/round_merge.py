"""Merges the client updates of a round into the next shared state."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fedtune import merging, techniques
from fedtune.server.algorithm_merge import correct_merged_state, scale_updates
from fedtune.server.class_payloads import list_trainable_tensors
from fedtune.server.merge_context import make_merge_context
from fedtune.server.merge_reference import find_next_reference, find_reference
from fedtune.server.private_aggregation import append_noise_step
from fedtune.server.round_failures import require_finite
from fedtune.server.run_state import name_run_state, select_run_state
from fedtune.server.server_run import ServerRun
from fedtune.tracking import MetricRecord
from fedtune.training.stream_place import trains_in_round
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.masked_weights import find_masks, restore_dense_tensors, select_active_values

__all__ = ["MergedRound", "merge_updates"]

SharedState = Mapping[str, Tensor]


class MergedRound(NamedTuple):
    """The next shared state, metrics of the merge, and what the server keeps for the next round."""

    state: SharedState
    figures: tuple[MetricRecord, ...] = ()
    run_state: SharedState | None = None
    increments: Mapping[str, merging.Increment] = {}


def merge_updates(
    run: ServerRun, state: SharedState, round_number: int, updates: Sequence[ClientUpdate]
) -> MergedRound:
    """Return the merged round; one of MERGE_ERRORS if it fails or is not finite.

    If no client trained, the state stays as it is, because a merge may change tensors without any delta.
    """
    trained = trains_in_round(run.context, round_number)
    merged = _merge(run, state, round_number, updates) if trained else MergedRound(dict(state))
    require_finite(merged.state)
    require_finite(merged.run_state or {})
    run.sending.bases.record_merge(round_number, state, merged.state, merged.increments)
    return merged._replace(figures=merged.figures + run.safeguards.bound.record_median_norm())


def _merge(run: ServerRun, state: SharedState, round_number: int, updates: Sequence[ClientUpdate]) -> MergedRound:
    """Merge a round's updates and apply the techniques' changes."""
    context, memory = run.context, run.memory.tensors
    pipeline = append_noise_step(
        context.recipe, merging.build_pipeline(context.recipe.merge), run.run_id, round_number, updates
    )
    masks, names = find_masks(state), list_trainable_tensors(context, round_number)
    active = select_active_values(state, masks)
    shapes = {name: tuple(active[name].shape) for name in names}
    updates = scale_updates(context.recipe, pipeline, updates, shapes)
    reference = find_reference(run, pipeline.combine, state, round_number)
    merge_context = make_merge_context(context, pipeline, state, round_number, names, updates)._replace(
        low_rank_pairs=techniques.list_low_rank_pairs(context.techniques, context.model),
        moments=select_run_state(memory, "merge"),
        reference=select_active_values(reference, masks),
    )
    errors = merging.measure_averaging_errors(pipeline, active, names, updates, merge_context)
    figures = tuple(MetricRecord(split="merge", domain="all", name=name, value=value) for name, value in errors.items())
    merged = merging.merge_round(pipeline, active, names, updates, merge_context)
    own = select_run_state(memory, "algorithm")
    corrected = correct_merged_state(context, active, merged.state, updates, shapes, own)
    extras = techniques.declare_extra_payload(context.techniques, context.model, round_number)
    weights = pipeline.combine.compute_client_weights([one.num_examples for one in updates])
    payloads = [
        techniques.ExtraPayload(weight, one.read_tensors(extras)) for weight, one in zip(weights, updates, strict=True)
    ]
    dense = restore_dense_tensors(corrected.state, masks)
    revised = techniques.after_aggregation(context.techniques, dense, round_number, payloads)
    leads = all(revised[name] is merged.state[name] for name in merged.increments)
    increments = merged.increments if leads else {}  # they lead from the weights before to those after
    run_state = {
        **name_run_state("merge", merged.moments),
        **name_run_state("reference", find_next_reference(pipeline.combine, reference, names, state, revised)),
        **name_run_state("algorithm", corrected.memory),
    }
    return MergedRound(revised, figures, run_state or None, increments)
