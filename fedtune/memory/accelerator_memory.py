"""Reads and resets the peak memory that torch holds on an accelerator."""

from typing import NamedTuple

import torch

__all__ = ["AcceleratorMemory", "read_accelerator_peak", "read_allocated_bytes", "reset_accelerator_peak"]


class AcceleratorMemory(NamedTuple):
    """Peaks in bytes: of tensors, and of all that torch took from the device, with what it keeps for reuse."""

    allocated: int
    reserved: int


def reset_accelerator_peak(device: torch.device) -> None:
    """Let the peaks of a CUDA device begin at the present memory. Other devices keep none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_accelerator_peak(device: torch.device) -> AcceleratorMemory | None:
    """Return the peaks since the last reset, as torch.cuda counts them; None for devices other than CUDA's."""
    if device.type != "cuda":
        return None
    return AcceleratorMemory(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def read_allocated_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors on an accelerator; 0 for the CPU."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
