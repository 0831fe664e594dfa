"""The cost of a training step with each technique. Each case is measured in its own process."""

from fedtune.profiling.gradient_check import gradient_error
from fedtune.profiling.isolated_process import profile_in_subprocess
from fedtune.profiling.measure_step import profile_step
from fedtune.profiling.profile_cases import (
    BASELINES,
    ProfileCase,
    format_techniques,
    list_profiled_techniques,
    make_profile_cases,
)
from fedtune.profiling.profile_results import FailedProfile, ProfileResult, StepProfile
from fedtune.profiling.step_inputs import encode_first_batch, make_random_batch

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
