"""The memory that a training process needs, from the trace of its step and the constants of its runtime.

anonymous = runtime + weights that are not read in place + copies of trained values + most + c
total     = anonymous + libraries' pages + weights that are read in place

``most`` is what the fullest moment of a round holds: the optimiser's values and the peak of a step with its gradients;
the optimiser's values and all gradients; or, once the optimiser is gone, the deltas and their copy in the payload. The
gradients of a batch that is cut into micro-batches are all there while the next one is processed. The received state is
in a file. Trained values count four bytes each. c bounds what no storage shows: blocks below the allocator's mmap
threshold, which stay in the heap, and scratch memory of the kernels. The process must fix that threshold
(``fix_mmap_threshold``).
"""

from typing import NamedTuple

from fedtune.plan.settings_trace import BatchTrace, SettingsTrace

__all__ = ["HOT_BYTES", "OPTIMISER_VALUES", "Prediction", "Runtime", "predict_memory"]

OPTIMISER_VALUES = {
    "sgd": 0.0,
    "lomo": 0.0,
    "adamw": 2.0,
    "adamw_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "lion_8bit": 0.25,
}
"""Values of four bytes that an optimiser holds for each trained value. lomo frees gradients early: not counted."""

HOT_BYTES = 64 << 20
"""The pages of libraries that a step runs again and again. The system may drop the other pages of files."""

_MARGIN = 16 << 20
_VALUE = 4
_AFTERWARDS = 2
"""Values for each trained one after training: the delta, and its copy in the payload."""


class Runtime(NamedTuple):
    """The memory of a process that has imported all it needs, before it loads a model."""

    anonymous_bytes: int
    file_bytes: int


class Prediction(NamedTuple):
    """Predicted peaks in bytes. ``needed_bytes`` is what a budget must allow: anonymous memory and hot code."""

    anonymous_bytes: int
    total_bytes: int
    needed_bytes: int


def predict_memory(
    trace: SettingsTrace, batch: BatchTrace, runtime: Runtime, optimiser: str, momentum: float
) -> Prediction:
    """Return the peaks of a process that trains in micro-batches of ``batch.examples``."""
    moments = OPTIMISER_VALUES[optimiser] + (momentum > 0) if trace.needs_gradients else 0
    own = trace.weight_bytes + trace.master_values * _VALUE + _find_most(trace, batch, moments)
    anonymous = runtime.anonymous_bytes + own + _MARGIN
    files = runtime.file_bytes + trace.mapped_bytes
    return Prediction(anonymous, anonymous + files, anonymous + min(files, HOT_BYTES))


def _find_most(trace: SettingsTrace, batch: BatchTrace, moments: float) -> int:
    """Return the bytes of the fullest moment. ``moments`` are an optimiser's values for each trained one."""
    trained = trace.trained_values * _VALUE
    gradients = trained if trace.needs_gradients else 0
    is_cut = batch.examples < trace.batches[-1].examples
    step = batch.peak_bytes + gradients if is_cut else batch.step_bytes
    return max(int(moments * trained) + max(step, gradients), _AFTERWARDS * trained)
