"""What a training step costs with each technique, each measured in a process of its own."""

from fedtune.profile.apart import profile_in_subprocess
from fedtune.profile.batch import encode_first_batch, make_random_batch
from fedtune.profile.case import BASELINES, ProfileCase, format_techniques, list_profiled_techniques, make_profile_cases
from fedtune.profile.gradients import gradient_error
from fedtune.profile.measure import profile_step
from fedtune.profile.row import FailedProfile, ProfileResult, StepProfile

__all__ = [
    "BASELINES",
    "FailedProfile",
    "ProfileCase",
    "ProfileResult",
    "StepProfile",
    "encode_first_batch",
    "format_techniques",
    "gradient_error",
    "list_profiled_techniques",
    "make_profile_cases",
    "make_random_batch",
    "profile_in_subprocess",
    "profile_step",
]
