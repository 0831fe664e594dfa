"""The profile that a device sends to its server: sizes and counts, but no data."""

import os
from pathlib import Path
from typing import Any

__all__ = ["make_device_profile"]

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def make_device_profile(memory: int, limit: str, holding: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return allowed bytes of memory, cores, data types of the processor, and the counts in ``holding`` if known.

    ``limit`` names what holds the trainer to its memory.
    """
    known = holding or {"examples": None, "labels": {}}
    return {"memory": memory, "memory_limit": limit, "cores": os.cpu_count() or 1, "dtypes": _dtypes(), **known}


def _dtypes() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return ["float32", "bfloat16"] if words & _BFLOAT16_FLAGS else ["float32"]
