"""The local loop a device runs: batches, loss, optimiser, metrics."""

from fedtune.training.evaluate import Score, score
from fedtune.training.loop import Outcome, step_loss, train, train_mode, update
from fedtune.training.order import total_steps
from fedtune.training.parts import received, trained_in
from fedtune.training.received_state import score_received
from fedtune.training.state import load_state, read_state, shapes
from fedtune.training.threads import processor_threads
from fedtune.training.workshop import Workshop, adopt, build_model, discard, workshop

__all__ = [
    "Outcome",
    "Score",
    "Workshop",
    "adopt",
    "build_model",
    "discard",
    "load_state",
    "processor_threads",
    "read_state",
    "received",
    "score",
    "score_received",
    "shapes",
    "step_loss",
    "total_steps",
    "train",
    "train_mode",
    "trained_in",
    "update",
    "workshop",
]
