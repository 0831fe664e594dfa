"""Recordings as inputs of a model, made by its own feature extractor.

Spectrograms take 15 to 40 ms of a processor each, so they are made once. Samples are kept as such: their inputs are
made batch by batch.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.data.table import Table
from fedtune.data.wave_files import Samples, decode_wave, describe_recording
from fedtune.errors import DataError, FedtuneWarning

__all__ = ["AudioReader", "EncodedAudio", "encode_recordings"]

_FULL_SCALE = 32768
_FRAMES_PER_SECOND = 100
"""A spectrogram of AST has a frame every 10 ms."""


@dataclass(frozen=True)
class AudioReader:
    """A feature extractor of transformers, the longest recording that it gets, and whether others are resampled."""

    extractor: Any
    max_seconds: float
    resample: bool

    def __post_init__(self) -> None:
        """Limit the length to that of the model's spectrogram."""
        longest = find_longest_seconds(self.extractor)
        if longest is not None and longest < self.max_seconds:
            object.__setattr__(self, "max_seconds", longest)

    @property
    def rate(self) -> int:
        """Samples per second of the model."""
        return int(self.extractor.sampling_rate)

    @property
    def max_samples(self) -> int:
        """Samples that a recording is cut or padded to."""
        return max(1, round(self.max_seconds * self.rate))

    def make_inputs(self, waves: Sequence[Samples]) -> dict[str, Tensor]:
        """Return the model's inputs, which have the same size for all recordings."""
        made = self.extractor(
            list(waves), sampling_rate=self.rate, padding="max_length", return_tensors="pt", **self._limits
        )
        return dict(made)

    @property
    def _limits(self) -> dict[str, Any]:
        """The length of an input. Spectrograms have the length that their model was made for."""
        is_spectrogram = find_longest_seconds(self.extractor) is not None
        return {} if is_spectrogram else {"max_length": self.max_samples, "truncation": True}


@dataclass(frozen=True)
class EncodedAudio:
    """Samples int16 of all recordings one after another; recording ``i`` begins at ``starts[i]``."""

    samples: NDArray[np.int16]
    starts: NDArray[np.int64]
    reader: AudioReader
    labels: Tensor
    domains: list[str] | None
    lengths: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the inputs of the model's feature extractor, and labels [k]."""
        waves = [self._wave(index) for index in indices]
        return {**self.reader.make_inputs(waves), "labels": self.labels[torch.as_tensor(indices)]}

    def _wave(self, index: int) -> Samples:
        return self.samples[self.starts[index] : self.starts[index + 1]].astype(np.float32) / np.float32(_FULL_SCALE)


@dataclass(frozen=True)
class EncodedSpectrograms:
    """Inputs [n, ...] of all recordings."""

    inputs: Tensor
    name: str
    labels: Tensor
    domains: list[str] | None
    lengths: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the model's input under its name, and labels [k]."""
        rows = torch.as_tensor(indices)
        return {self.name: self.inputs[rows], "labels": self.labels[rows]}


def find_longest_seconds(extractor: Any) -> float | None:
    """Return the length in seconds that a spectrogram has by its settings; None for a model of raw samples."""
    settings = extractor.to_dict()
    if "chunk_length" in settings:
        return float(settings["chunk_length"])
    return settings["max_length"] / _FRAMES_PER_SECOND if "num_mel_bins" in settings else None


def encode_recordings(table: Table, reader: AudioReader, labels: Tensor) -> EncodedAudio | EncodedSpectrograms:
    """Encode the column ``audio`` with ``labels``, cut to the longest length. A warning counts what is cut.

    Raises DataError for a recording that cannot be decoded or has another rate.
    """
    kept: list[NDArray[np.int16]] = []
    cut = 0
    for row, record in enumerate(table.records("audio")):
        wave = _at_rate(*decode_wave(record, name := describe_recording(record, row)), reader, name)
        cut += len(wave) > reader.max_samples
        kept.append(_sixteen_bits(wave[: reader.max_samples]))
    if cut:
        warnings.warn(
            f"{cut} of {len(kept)} recordings are longer than {reader.max_seconds:g} seconds, and what follows is cut; "
            "change max_seconds of the task to read more",
            FedtuneWarning,
            stacklevel=2,
        )
    starts = np.cumsum([0, *map(len, kept)])
    found = EncodedAudio(np.concatenate(kept or [np.zeros(0, np.int16)]), starts, reader, labels, table.domains)
    return found if find_longest_seconds(reader.extractor) is None or not len(found) else _make_spectrograms(found)


def _make_spectrograms(found: EncodedAudio) -> EncodedSpectrograms:
    name = found.reader.extractor.model_input_names[0]
    inputs = torch.cat([found.make_batch([row])[name] for row in range(len(found))])
    return EncodedSpectrograms(inputs, name, found.labels, found.domains)


def _at_rate(wave: Samples, rate: int, reader: AudioReader, name: str) -> Samples:
    """Resample to the model's rate with a polyphase filter; DataError unless the task allows it."""
    if rate == reader.rate:
        return wave
    if not reader.resample:
        raise DataError(
            f"{name} has {rate} samples per second, but the model reads {reader.rate}; set "
            "task: {audio-classification: {resample: true}}, or convert the recordings"
        )
    from scipy.signal import resample_poly  # imported here: a minimal install lacks it

    shared = math.gcd(rate, reader.rate)
    return np.asarray(resample_poly(wave, reader.rate // shared, rate // shared), np.float32)


def _sixteen_bits(wave: Samples) -> NDArray[np.int16]:
    """Round to 16 bits, which most recordings have, in half the memory."""
    return np.clip(np.round(wave * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
