"""One result of a profile: the figures of a case, or why it could not run."""

from dataclasses import dataclass

__all__ = ["FailedProfile", "ProfileResult", "StepProfile"]


@dataclass(frozen=True)
class StepProfile:
    """The cost of a step. If rounds differ (LoRA trains its factors in turn), each figure is the larger one.

    ``kept_bytes`` is the activation memory kept for backward when the forward pass ends. ``peak_bytes`` is the peak of
    both passes, without parameters and their gradients. ``rss_bytes`` is the peak of the process while it trains, and
    ``loaded_bytes`` its memory before, with the model. ``seconds`` is the median of a whole step. A round sends
    ``wire_bytes`` up and ``down_bytes`` down. ``gradient_error`` is None if gradients were not checked.
    ``anonymous_bytes`` and ``file_bytes`` are the peaks of the two parts of the process's memory while it trains, and
    ``loaded_anonymous_bytes`` is the first before; None where the system does not tell them apart. ``allocator`` says
    which one ran, and how it is set. On CUDA, ``accelerator_bytes`` and ``accelerator_reserved_bytes`` are torch's
    peaks of allocated and reserved memory while it trains, with the model.
    """

    technique: str
    kept_bytes: int
    peak_bytes: int
    rss_bytes: int
    loaded_bytes: int
    seconds: float
    trainable: int
    wire_bytes: int
    down_bytes: int
    gradient_error: float | None = None
    device_type: str = "cpu"
    accelerator_bytes: int | None = None
    accelerator_reserved_bytes: int | None = None
    anonymous_bytes: int | None = None
    file_bytes: int | None = None
    loaded_anonymous_bytes: int | None = None
    allocator: str = ""


@dataclass(frozen=True)
class FailedProfile:
    """A case that could not run, and the reason in one sentence."""

    technique: str
    error: str


ProfileResult = StepProfile | FailedProfile
