"""Decodes wav files to one channel of samples. Errors name the recording that cannot be read."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.data.decode import Unreadable

__all__ = ["Samples", "decode_wave", "describe_recording"]

Samples = NDArray[np.float32]
_SHORTEST = 0.025
"""Seconds of the window that spectrograms are made of; models make nothing of less."""
_LOUDEST = 2.0
"""Real numbers from -1 to 1 are full scale, and mixing may exceed it a little."""


def describe_recording(record: Mapping[str, Any], row: int) -> str:
    """Return the name of a recording in messages: its path, or its row counted from 1."""
    return str(record["path"]) if record.get("path") else f"the recording in row {row + 1}"


def decode_wave(record: Mapping[str, Any], name: str) -> tuple[Samples, int]:
    """Decode a wav file to samples float32 [n] in -1..1 and their rate in Hz. Channels are averaged.

    Raises Unreadable with the recording's name.
    """
    try:
        content = record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()
        rate, stored = _read(content)
        samples = _scale(stored)
        if len(samples) < _SHORTEST * rate:
            raise ValueError(f"it has {len(samples)} samples, less than {_SHORTEST * 1000:.0f} ms")
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split()).rstrip(".")
        raise Unreadable(
            f"{name} cannot be read as a wav file ({reason}); fix, convert or remove it, or set data.skip_unreadable"
        ) from error
    return samples, rate


def _read(content: bytes) -> tuple[int, NDArray[Any]]:
    """Return the rate and the samples [n] or [n, channels] as stored; ValueError where the file ends early."""
    from scipy.io import wavfile  # imported here: a minimal install lacks it

    if content[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        raise ValueError("it has no RIFF header")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", wavfile.WavFileWarning)
        try:
            rate, stored = wavfile.read(io.BytesIO(content))
        except Exception as error:  # a damaged header fails in many ways, e.g. with struct.error or UnboundLocalError
            reason = str(error) if isinstance(error, ValueError) else "its header is damaged or it has no samples"
            raise ValueError(reason) from error
    streamed = content[4:8] == b"\xff" * 4  # by a program that did not know the length beforehand
    if not streamed and any("EOF" in str(one.message) for one in told):
        raise ValueError("it ends before the length that its header declares")
    if not rate:
        raise ValueError("its header declares 0 samples per second")
    return int(rate), stored


def _scale(stored: NDArray[Any]) -> Samples:
    """Scale whole numbers to -1..1 and average the channels."""
    if stored.dtype == np.uint8:
        samples = (stored.astype(np.float32) - 128) / 128
    elif np.issubdtype(stored.dtype, np.integer):
        samples = stored.astype(np.float64) / -float(np.iinfo(stored.dtype).min)
    else:
        samples = stored
        if not np.isfinite(samples).all() or np.abs(samples).max(initial=0) > _LOUDEST:
            raise ValueError("its real numbers are not between -1 and 1; scale them")
    mono = samples if samples.ndim == 1 else samples.mean(1)
    return mono.astype(np.float32)
