"""Audio classification: one recording, and one class.

What: the model gets a new head over the pretrained layers, with one output for each class of the data.
Columns: ``audio`` (wav files of any depth; channels are averaged) and ``label``. The model's own feature extractor
makes the inputs. A recording is cut or padded to ``max_seconds``, or to the length of a spectrogram model. One with
another rate than the model's is refused unless ``resample`` is true.
Loss: the mean cross entropy over the recordings of a batch.
Metrics: accuracy (the main one), loss and those that ``evaluation.metrics`` names.
Models: those of ``AutoModelForAudioClassification`` whose inputs are made by the feature extractors of wav2vec2
(HuBERT, WavLM and their kin), Whisper or AST. Masks that a model draws in training (SpecAugment) are off.
Install: scipy reads and resamples wav files; a device's minimal install lacks it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune import models
from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_audio import AudioReader, encode_recordings
from fedtune.recipe.schema import Recipe, Train
from fedtune.tasks._classification import Classification

__all__ = ["AudioClassification"]


class AudioClassification(Classification):
    """Predict what a recording is labelled with."""

    name: ClassVar[str] = "audio-classification"
    auto_class: ClassVar[str] = "AutoModelForAudioClassification"
    reads_text: ClassVar[bool] = False

    max_seconds: float = Field(5.0, ge=0.025, le=600, description="length that recordings are cut or padded to")
    resample: bool = Field(False, description="convert recordings of another rate to the model's")

    @property
    def columns(self) -> tuple[str, ...]:
        """Recordings and their labels."""
        return ("audio", self.problem.label_column)

    @property
    def head_problem(self) -> str | None:
        """One class for each recording."""
        return "single_label_classification"

    def make_head_settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """One output for each class; no random masks, which are not drawn from the recipe's seed."""
        return {**super().make_head_settings(labels), "apply_spec_augment": False}

    def load_reader(self, recipe: Recipe) -> AudioReader:
        """The model's feature extractor, with the length and the rate that the task sets."""
        return AudioReader(models.load_feature_extractor(recipe.model), self.max_seconds, self.resample)

    def save_reader(self, reader: Any, folder: Path) -> None:
        """Write ``preprocessor_config.json``."""
        reader.extractor.save_pretrained(folder)

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Samples and labels."""
        return encode_recordings(examples, reader, self.problem.encode_labels(examples))

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Noise of the largest length, and random labels."""
        reader, size = self.load_reader(recipe), recipe.train.batch_size
        noise = 0.1 * torch.randn(size, reader.max_samples, generator=generator)
        labels = self.problem.draw_labels(size, num_labels, generator)
        return {**reader.make_inputs(list(np.asarray(noise))), "labels": labels}

    def describe_input_size(self, train: Train) -> str:
        """Seconds."""
        return f"{self.max_seconds:g} seconds"
