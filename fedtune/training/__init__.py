"""Local training on a device: batches, loss, optimiser and metrics."""

from fedtune.training.batches import total_steps
from fedtune.training.client_round import ClientRound
from fedtune.training.cpu_threads import use_cpu_threads
from fedtune.training.device_classes import get_received_shapes, list_tensors_of_round
from fedtune.training.evaluation import EvaluatedModel, Metric, evaluate_model
from fedtune.training.local_training import LocalTrainingResult, train_local_model
from fedtune.training.model_state import get_model_state, get_tensor_shapes, named_tensors, precise, set_model_state
from fedtune.training.optimiser_step import apply_optimiser_step
from fedtune.training.received_state import score_received
from fedtune.training.run_context import RunContext, clear_run_context, get_run_context, prepare_model, set_run_context
from fedtune.training.step_loss import compute_step_loss
from fedtune.training.train_mode import set_train_mode

__all__ = [
    "ClientRound",
    "EvaluatedModel",
    "LocalTrainingResult",
    "Metric",
    "RunContext",
    "apply_optimiser_step",
    "clear_run_context",
    "compute_step_loss",
    "evaluate_model",
    "get_model_state",
    "get_received_shapes",
    "get_run_context",
    "get_tensor_shapes",
    "list_tensors_of_round",
    "named_tensors",
    "precise",
    "prepare_model",
    "score_received",
    "set_model_state",
    "set_run_context",
    "set_train_mode",
    "total_steps",
    "train_local_model",
    "use_cpu_threads",
]
