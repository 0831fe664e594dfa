"""A small audio spectrogram transformer with random weights, since no package ships a pretrained model of audio."""

from pathlib import Path

import torch

from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["make_spectrogram_transformer_folder"]

_FRAMES, _BINS = 200, 64
"""Two seconds of 64 mel bands."""


def make_spectrogram_transformer_folder() -> Path:
    """Return the folder of the untrained model and its feature extractor. Its weights are the same everywhere."""
    folder = get_cache_folder() / "audio-models" / "spectrogram-transformer"
    make_folder_once(folder, _save, "sample:spectrogram-transformer")
    return folder


def _save(folder: Path) -> None:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    from fedtune.models.transformers_logging import silence_transformers

    config = ASTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_length=_FRAMES,
        num_mel_bins=_BINS,
        frequency_stride=16,
        time_stride=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5  # languages of the spoken prompts
    with torch.random.fork_rng(devices=[]), silence_transformers():
        torch.manual_seed(0)
        ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=_FRAMES, num_mel_bins=_BINS).save_pretrained(folder)
