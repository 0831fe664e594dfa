"""The loss of the received model on all examples of a client, and its gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedtune.accelerator import find_device, move_tensors
from fedtune.algorithms._algorithm import AlgorithmSetup

__all__ = ["compute_received_gradient", "compute_received_loss"]


def compute_received_loss(setup: AlgorithmSetup) -> float:
    """Return the mean loss over the client's examples, without dropout."""
    with torch.no_grad():
        return sum(share * float(loss) for share, loss in _iter_losses(setup))


def compute_received_gradient(setup: AlgorithmSetup) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over the client's examples, without dropout; zero where none arrives."""
    setup.model.zero_grad()
    for share, loss in _iter_losses(setup):
        (loss * share).backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in setup.parameters.items()
    }
    setup.model.zero_grad()
    return found


def _iter_losses(setup: AlgorithmSetup) -> Iterator[tuple[float, Tensor]]:
    """Yield the losses of the batches with their shares of the examples."""
    rows, size, training = setup.rows.tolist(), setup.batch_size, setup.model.training
    setup.model.eval()
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        batch = move_tensors(setup.examples.make_batch(chosen), find_device(setup.model))
        yield len(chosen) / len(rows), setup.run_forward(batch)[0]
    setup.model.train(training)
