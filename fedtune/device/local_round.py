"""One round of a client, as a function of the train request and the state. Simulations and devices both call it."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune.accelerator import require_device
from fedtune.device import local_state
from fedtune.device.algorithm_memory import read_algorithm_inputs, write_algorithm_memory
from fedtune.device.coded_update import encode_client_update
from fedtune.device.held_base import with_base
from fedtune.device.private_update import make_update_private, redact_report
from fedtune.device.stream_memory import add_stored_tensors, count_stored_bytes, write_stored_tensors
from fedtune.memory import MemoryWatch, peak_rss, reset_peak_rss
from fedtune.plan.device_plans import find_plan_number
from fedtune.training import (
    ClientRound,
    RunContext,
    get_tensor_shapes,
    score_received,
    train_local_model,
)
from fedtune.training.holdout_split import count_held_out
from fedtune.training.stream_place import make_stream_round
from fedtune.wire.client_update import (
    DEVICE_TYPES,
    FEWEST,
    ClientReport,
    HoldoutMetrics,
    TrainRequest,
    decode_tensors,
    pack,
)
from fedtune.wire.masked_weights import decode_masked_state, find_masks, select_active_values
from fedtune.wire.memory_names import split_memory
from fedtune.wire.recipe_codecs import build_down_pipeline
from fedtune.wire.state_message import decode_state
from fedtune.wire.stored_state import StoredState
from fedtune.wire.task_figures import TaskFigures

__all__ = ["read_payload", "run_local_round"]


def read_payload(payload: bytes | Path, context: RunContext, client: int) -> Mapping[str, Tensor]:
    """Return the state sent to a client. From a file, tensors are read on access, so that no copy stays in memory.

    Coded states are decoded as a whole.
    """
    shapes = get_tensor_shapes(context.for_client(client).model)
    pipeline = build_down_pipeline(context.recipe)
    if pipeline is not None:
        content = payload.read_bytes() if isinstance(payload, Path) else payload
        return decode_masked_state(decode_state(pipeline, content, shapes), shapes)
    sent = StoredState(payload) if isinstance(payload, Path) else decode_tensors(payload)
    return decode_masked_state(sent, shapes)


def run_local_round(
    request: TrainRequest,
    state: Mapping[str, Tensor],
    context: RunContext,
    rows: NDArray[np.int64],
    folder: Path,
    micro: int | None = None,
) -> tuple[bytes, ClientReport]:
    """Train from ``state`` on ``rows`` of the run context's train split. Return the deltas, packed, and a report.

    For a request with ``scoring``, there are no deltas, and the report has only holdout metrics.

    ``folder`` contains the client's local state in this run. ``micro`` is the micro-batch size. The report contains no
    loss and no metric over fewer than ``FEWEST`` examples.
    """
    part = context.for_client(request.client)
    require_device(part.recipe.train.device)
    if request.scoring:
        return pack({}), _scored(request, state, context, rows, folder)
    state, received = split_memory(state)
    state, own = with_base(request, state, part, folder), _own(part, folder, request.round)
    stream = make_stream_round(context, rows, request.round, request.client, received=received)
    stream = add_stored_tensors(stream, part.recipe, request, folder)
    rows = rows if stream is None else stream.rows
    recipe = part.recipe.get_round_recipe(request.round)
    client = ClientRound(
        part.model, part.techniques, recipe, context.train, rows, request.round, request.client, own, micro, stream
    )
    client = replace(client, algorithm=read_algorithm_inputs(part.recipe, request, received, folder))
    with MemoryWatch() as memory:
        outcome = train_local_model(client, state)
    if outcome.local_tensors:
        local_state.save_local_state(folder, request.round, outcome.local_tensors)
    write_stored_tensors(outcome.remembered, stream, part.recipe, request, folder)
    write_algorithm_memory(outcome.algorithm_memory, part.recipe, request, folder)
    held_out = count_held_out(len(rows), part.recipe.evaluation.local_holdout)
    loss = outcome.train_loss if len(rows) - held_out >= FEWEST else math.nan
    scores = _told(outcome.holdout_metrics, outcome.trained_score) if held_out >= FEWEST else {}
    scores |= _tell_tasks(outcome.task_figures)
    stored = count_stored_bytes(stream, part.recipe, request, folder)
    peak = outcome.accelerator_peak
    cost = outcome.num_examples, loss, outcome.seconds, outcome.activation_bytes, outcome.peak_rss
    report = ClientReport(
        *cost,
        micro_batch_size=outcome.micro_batch_size,
        device_code=DEVICE_TYPES.index(outcome.device_type) or None,
        accelerator_memory=None if peak is None else peak.allocated,
        accelerator_reserved=None if peak is None else peak.reserved,
        drift_score=None if outcome.drift is None else outcome.drift.value,
        drift_examples=None if outcome.drift is None else outcome.drift.num_examples,
        stored_bytes=stored,
        anonymous_memory=memory.anonymous,
        file_memory=memory.file_backed,
        plan_number=find_plan_number(part.recipe, outcome.micro_batch_size),
        **scores,
    )
    deltas, privacy = select_active_values(outcome.delta, find_masks(state)), part.recipe.privacy
    if privacy is None:
        return encode_client_update(deltas, outcome.extra_payload, recipe, request, folder), report
    sent = make_update_private(deltas, outcome.extra_payload, privacy, request, folder)
    message = encode_client_update(sent, {}, recipe, request, folder)
    return message, redact_report(report) if privacy.noise_added_by == "clients" else report


def _scored(
    request: TrainRequest,
    state: Mapping[str, Tensor],
    context: RunContext,
    rows: NDArray[np.int64],
    folder: Path,
) -> ClientReport:
    """Return the report of a client that only scores the state; without scores if the recipe has privacy."""
    started, part = time.perf_counter(), context.for_client(request.client)
    recipe = part.recipe
    reset_peak_rss()
    own = _own(part, folder, request.round + 1)
    stream = make_stream_round(context, rows, request.round, request.client, scoring=True)
    rows = rows if stream is None else stream.rows
    client = ClientRound(
        part.model, part.techniques, recipe, context.train, rows, request.round, request.client, own, stream=stream
    )
    score, of_tasks = score_received(client, split_memory(state)[0])
    tells = count_held_out(len(rows), recipe.evaluation.local_holdout) >= FEWEST and recipe.privacy is None
    figures = _told(score) if tells else {}
    figures |= _tell_tasks(of_tasks) if recipe.privacy is None else {}
    cost = time.perf_counter() - started, 0, peak_rss()
    return ClientReport(0, math.nan, *cost, device_code=DEVICE_TYPES.index(part.device.type), **figures)


def _own(part: RunContext, folder: Path, before: int) -> dict[str, Tensor]:
    """Return the client's local tensors as they are before a round."""
    return {**part.local_tensors, **local_state.load_local_state(folder, before)} if part.local_tensors else {}


def _tell_tasks(figures: TaskFigures | None) -> dict[str, Any]:
    """Return the fields of a report that concern the tasks of a stream."""
    if figures is None:
        return {}
    return {f"task_{name}": value for name, value in figures._asdict().items()}


def _told(before: HoldoutMetrics, after: HoldoutMetrics | None = None) -> dict[str, Any]:
    """Return the holdout fields of a report; none if no predictions were made."""
    if not before.num_predictions:
        return {}
    first = {
        "num_holdout_predictions": before.num_predictions,
        "holdout_loss": before.loss,
        "holdout_accuracy": before.accuracy,
    }
    trained = {} if after is None else {"trained_holdout_metrics": [after.loss, after.accuracy, *after.more]}
    return {**first, "extra_holdout_metrics": list(before.more), **trained}
