"""What a stream changes in a client's round: the classes of the head, the progress of a task, and the methods."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedtune.accelerator import find_device, move_tensors
from fedtune.continual import MethodRound, MethodSetup, mask_classes, name_memory, select_memory
from fedtune.techniques import begin_step
from fedtune.training.client_round import ClientRound
from fedtune.training.step_loss import capture_logits, compute_step_loss

__all__ = [
    "add_memory_gradients",
    "begin_methods",
    "collect_stored_tensors",
    "collect_uploads",
    "compute_lr_progress",
    "compute_method_terms",
    "mask_seen_classes",
    "mask_trained_classes",
    "run_forward",
]


def begin_methods(client: ClientRound) -> ClientRound:
    """Return the round with its continual methods, which see the received state in the model."""
    stream = client.stream
    if stream is None:
        return client
    rows, _ = client.split_rows()
    started = [
        method.begin_round(
            MethodSetup(
                model=client.model,
                task=client.task,
                recipe=client.recipe,
                place=stream.place,
                client=client.client,
                examples=client.examples,
                rows=rows,
                derive_seed=client.derive_seed,
                stored={visit: select_memory(method, tensors) for visit, tensors in stream.stored.items()},
                received=select_memory(method, stream.received),
                classes=stream.classes,
                num_labels=stream.num_labels,
                micro_batch_size=client.micro_batch_size,
                all_rows=stream.all_rows,
                list_classes=stream.list_classes,
                run_forward=partial(run_forward, client),
                num_tasks=stream.num_tasks,
                held_rows={task: replace(client, rows=own).split_rows()[0] for task, own in stream.held_rows.items()},
            )
        )
        for method in stream.methods
    ]
    return replace(client, method_rounds=started)


def run_forward(client: ClientRound, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the loss of a batch of other examples, as a step computes it, and the model's logits."""
    moved = move_tensors(batch, find_device(client.model))
    begin_step(client.techniques, client.model, moved, client.number / client.recipe.federation.rounds)
    with capture_logits(client.model, wanted=True) as logits:
        loss = compute_step_loss(client.task, client.model, moved)
    return loss, logits[-1] if logits else None


def mask_trained_classes(client: ClientRound) -> AbstractContextManager[None]:
    """Let the model predict only the classes that the loss compares."""
    stream = client.stream
    return nullcontext() if stream is None else mask_classes(client.model, stream.classes, stream.num_labels)


def mask_seen_classes(client: ClientRound) -> AbstractContextManager[None]:
    """Let the model predict only the classes that it has seen."""
    stream = client.stream
    return nullcontext() if stream is None else mask_classes(client.model, stream.seen_classes, stream.num_labels)


def compute_lr_progress(client: ClientRound, step: int, steps: int) -> float:
    """Return the share 0..1 of the learning rate schedule that is completed: of the run, or of the task in a stream."""
    if client.stream is None:
        return ((client.number - 1) + step / steps) / client.recipe.federation.rounds
    return ((client.stream.place.round - 1) + step / steps) / client.stream.place.rounds


def compute_method_terms(
    rounds: Sequence[MethodRound], rows: Sequence[int], batch: Mapping[str, Tensor], logits: Sequence[Tensor]
) -> list[Tensor]:
    """Return the terms that continual methods add to the loss of a micro-batch."""
    last = logits[-1] if logits else None
    terms = (one.compute_batch_term(rows, batch, last) for one in rounds)
    return [term for term in terms if term is not None]


def add_memory_gradients(rounds: Sequence[MethodRound]) -> None:
    """Add the gradients of the losses on what the methods remember."""
    for one in rounds:
        for loss in one.iter_memory_losses():
            loss.backward()


def collect_stored_tensors(client: ClientRound) -> dict[str, Tensor]:
    """Return what the device keeps of this visit, by method."""
    return _collect(client, [one.list_stored_tensors() for one in client.method_rounds])


def collect_uploads(client: ClientRound) -> dict[str, Tensor]:
    """Return what the client uploads at the end of its task, or at its begin, by method; nothing in other rounds."""
    stream = client.stream
    if stream is None or not stream.uploading:
        return {}
    begun = zip(stream.methods, client.method_rounds, strict=True)
    return _collect(client, [one.compute_upload() if method in stream.uploading else {} for method, one in begun])


def _collect(client: ClientRound, found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    assert client.stream is not None or not found
    methods = client.stream.methods if client.stream is not None else ()
    named = [name_memory(method, tensors) for method, tensors in zip(methods, found, strict=True)]
    return {name: tensor.detach().to(torch.device("cpu")) for tensors in named for name, tensor in tensors.items()}
