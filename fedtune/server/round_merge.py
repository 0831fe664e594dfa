"""Merges the client updates of a round into the next shared state."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune import merging, techniques
from fedtune.server.class_payloads import list_trainable_tensors
from fedtune.server.merge_context import make_merge_context
from fedtune.server.merge_reference import find_reference
from fedtune.server.private_aggregation import append_noise_step
from fedtune.server.round_failures import require_finite
from fedtune.server.server_run import ServerRun
from fedtune.tracking import MetricRecord
from fedtune.training.stream_place import trains_in_round
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.masked_weights import find_masks, restore_dense_tensors, select_active_values

__all__ = ["merge_updates"]

SharedState = Mapping[str, Tensor]


def merge_updates(
    run: ServerRun, state: SharedState, round_number: int, updates: Sequence[ClientUpdate]
) -> tuple[SharedState, tuple[MetricRecord, ...]]:
    """Return the merged state and the metrics of the merge; one of MERGE_ERRORS if it fails or is not finite."""
    merged, figures = _merge(run, state, round_number, updates)
    require_finite(merged.state)
    run.sending.bases.record_merge(round_number, state, *merged)
    return merged.state, figures + run.safeguards.bound.record_median_norm()


def _merge(
    run: ServerRun, state: SharedState, round_number: int, updates: Sequence[ClientUpdate]
) -> tuple[merging.Merged, tuple[MetricRecord, ...]]:
    """Merge a round's updates and apply the techniques' changes; return the next state and metrics of the merge.

    If no client trained, the state stays as it is, because a merge may change tensors without any delta.
    """
    context = run.context
    if not trains_in_round(context, round_number):
        return merging.Merged(dict(state), {}), ()
    pipeline = append_noise_step(
        context.recipe, merging.build_pipeline(context.recipe.merge), run.run_id, round_number, updates
    )
    masks, names = find_masks(state), list_trainable_tensors(context, round_number)
    merge_context = make_merge_context(context, pipeline, state, round_number, names, updates)
    pairs = techniques.list_low_rank_pairs(context.techniques, context.model)
    reference = select_active_values(find_reference(run, pipeline.combine, state, round_number), masks)
    merge_context = merge_context._replace(low_rank_pairs=pairs, reference=reference)
    active = select_active_values(state, masks)
    errors = merging.measure_averaging_errors(pipeline, active, names, updates, merge_context)
    figures = (MetricRecord(split="merge", domain="all", name=name, value=value) for name, value in errors.items())
    merged, increments = merging.merge_round(pipeline, active, names, updates, merge_context)
    extras = techniques.declare_extra_payload(context.techniques, context.model, round_number)
    weights = pipeline.combine.compute_client_weights([one.num_examples for one in updates])
    payloads = [
        techniques.ExtraPayload(weight, one.read_tensors(extras)) for weight, one in zip(weights, updates, strict=True)
    ]
    dense = restore_dense_tensors(merged, masks)
    revised = techniques.after_aggregation(context.techniques, dense, round_number, payloads)
    leads = all(revised[name] is merged[name] for name in increments)  # from the weights before to those after
    return merging.Merged(revised, increments if leads else {}), tuple(figures)
