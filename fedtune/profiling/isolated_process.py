"""Profile each case in a fresh process.

Peak resident memory never falls, so a second case in the same process would report the peak of the first.
"""

import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from fedtune.accelerator import is_out_of_memory
from fedtune.errors import FedtuneError
from fedtune.interrupts import start_without_interrupts
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.profiling.measure_step import profile_step
from fedtune.profiling.profile_cases import ProfileCase
from fedtune.profiling.profile_results import FailedProfile, ProfileResult, StepProfile

__all__ = ["profile_in_subprocess", "try_profile"]


def profile_in_subprocess(case: ProfileCase) -> ProfileResult:
    """Measure in a fresh process. Any failure becomes a result with one sentence."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sending, case), daemon=True)
    with start_without_interrupts():
        process.start()
    sending.close()
    try:
        row: ProfileResult = receiving.recv()
    except EOFError:
        row = FailedProfile(
            case.technique, "its process was killed, perhaps because memory was short; try a smaller batch"
        )
    finally:
        process.kill()
        process.join()
    return row


def _send_result(sending: Connection, case: ProfileCase) -> None:
    allocator = fix_mmap_threshold()
    row = try_profile(case)
    sending.send(replace(row, allocator=allocator) if isinstance(row, StepProfile) else row)


def try_profile(case: ProfileCase) -> ProfileResult:
    """Measure in this process: return the figures, or why there are none."""
    try:
        return profile_step(case)
    except FedtuneError as error:
        return FailedProfile(case.technique, str(error))
    except Exception as error:
        return FailedProfile(case.technique, _describe_error(error))


def _describe_error(error: Exception) -> str:
    """Describe an unexpected error in one line, and plainly if memory is short."""
    first = str(error).partition("\n")[0].strip()
    if isinstance(error, torch.OutOfMemoryError) or "MPS" in first:
        return "a step needs more memory than the accelerator has; try a smaller batch"
    if is_out_of_memory(error):
        return "a step needs more memory than this machine has; try a smaller batch"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
