"""One line of a profile: the figures of a case, or why it could not run."""

from dataclasses import dataclass

__all__ = ["FailedProfile", "ProfileResult", "StepProfile"]


@dataclass(frozen=True)
class StepProfile:
    """What a step costs; where rounds differ (LoRA trains its factors in turn), each figure is that of the costlier.

    ``kept_bytes`` are held for the backward pass when the forward pass ends, ``peak_bytes`` at the worst moment of
    both passes, without parameters and their gradients. ``rss_bytes`` is the peak of the process while it trains and
    ``loaded_bytes`` what it held before, the model among it. ``seconds`` are the median of a whole step. Payloads of a
    round: ``wire_bytes`` up, ``down_bytes`` down. ``gradient_error`` is None unless it was asked for.
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


@dataclass(frozen=True)
class FailedProfile:
    """A case that could not run, and why, in one sentence."""

    technique: str
    error: str


ProfileResult = StepProfile | FailedProfile
