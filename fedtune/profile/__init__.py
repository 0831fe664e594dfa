"""What a training step costs with each technique, each measured in a process of its own."""

from fedtune.profile.apart import measure_apart
from fedtune.profile.batch import first_batch, random_batch
from fedtune.profile.case import YARDSTICKS, Case, cases, every, label
from fedtune.profile.gradients import gradient_error
from fedtune.profile.measure import measure
from fedtune.profile.row import Failed, Figures, Row

__all__ = [
    "YARDSTICKS",
    "Case",
    "Failed",
    "Figures",
    "Row",
    "cases",
    "every",
    "first_batch",
    "gradient_error",
    "label",
    "measure",
    "measure_apart",
    "random_batch",
]
