"""The process that traces. ``python -m fedtune.plan.worker`` reads a request from standard input and prints the traces.

It is a process of its own, since it changes libraries and imports what no other command needs.
"""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
from pydantic import BaseModel

from fedtune import tasks
from fedtune.errors import FedtuneError
from fedtune.models.blocks.preference import prefer_plain_blocks
from fedtune.models.image_model_files import is_fedtune_image_model
from fedtune.models.skeleton import make_skeleton
from fedtune.models.sources import locate_model
from fedtune.plan.candidates import Candidate, list_candidates
from fedtune.plan.conversations import names_conversations
from fedtune.plan.settings_trace import SettingsTrace
from fedtune.plan.step_trace import use_fake_tensors
from fedtune.plan.trace_settings import trace_candidate
from fedtune.recipe.schema import Recipe
from fedtune.recipe.train_settings import Unit
from fedtune.techniques import build_techniques

__all__ = ["TraceReply", "TraceRequest", "describe_data", "trace_request"]


class TraceRequest(BaseModel):
    """A recipe, whose data may be ``random``. ``techniques`` replaces the lists that are considered by default.

    With ``plain_blocks``, models are of plain blocks where a device's trainer builds them so.
    """

    recipe: Recipe
    techniques: list[list[Unit]] | None = None
    plain_blocks: bool = True


class TraceReply(BaseModel):
    """A trace of each candidate, in order."""

    traces: list[SettingsTrace]


def trace_request(request: TraceRequest) -> TraceReply:
    """Trace all candidates, some at the same time where the machine has several cores."""
    recipe = request.recipe
    own = is_fedtune_image_model(locate_model(recipe.model))
    found = list_candidates(recipe, request.techniques, is_own_image_model=own)
    torch.set_num_threads(1)
    _prepare(recipe, found)
    labels, has_conversations = describe_data(recipe)
    trace = partial(trace_candidate, recipe, labels, has_conversations=has_conversations)
    count = min(len(found), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if count < 2:
        return TraceReply(traces=[trace(one) for one in found])
    with multiprocessing.get_context("fork").Pool(count) as pool:
        return TraceReply(traces=pool.map(trace, found, chunksize=1))


def _prepare(recipe: Recipe, candidates: Sequence[Candidate]) -> None:
    """Import once what every trace needs, and build the model once, so that its errors are raised here."""
    for candidate in candidates:
        with suppress(FedtuneError):  # reported with the candidate's trace
            build_techniques(candidate.techniques)
    task = tasks.get_task(recipe.task)
    with use_fake_tensors():
        make_skeleton(recipe.model, task, ("no", "yes") if task.has_new_head else (), seed=0)


def describe_data(recipe: Recipe) -> tuple[tuple[str, ...], bool]:
    """Return the class names of the data, two for random inputs, and whether a chat template writes the texts."""
    task = tasks.get_task(recipe.task)
    if recipe.data.source == "random":
        return ("no", "yes") if task.has_new_head else (), names_conversations(recipe)
    corpus = tasks.load_data(recipe, tasks.load_class_names(recipe))
    return corpus.label_names, "messages" in corpus.train.column_names


def main() -> None:
    """Reply to the request on standard input."""
    warnings.simplefilter("ignore")
    request = TraceRequest.model_validate_json(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the reply
    if request.plain_blocks:
        prefer_plain_blocks()
    out.write(trace_request(request).model_dump_json())
    out.close()


if __name__ == "__main__":
    main()
