"""Loads the feature extractor of an audio model, which makes its inputs of samples."""

from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor

from fedtune.errors import ModelError
from fedtune.models.load_errors import explain_load_errors
from fedtune.models.transformers_logging import silence_transformers

__all__ = ["load_feature_extractor"]

_SUPPORTED = ("ASTFeatureExtractor", "Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor")


def load_feature_extractor(source: str, location: str) -> Any:
    """Load the feature extractor at ``location``; ModelError where it is missing or of a kind not supported here."""
    with explain_load_errors(source), silence_transformers():
        found = AutoFeatureExtractor.from_pretrained(location, trust_remote_code=False)
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    kind = type(found).__name__
    if kind not in _SUPPORTED:
        raise ModelError(
            f"{source}: its inputs are made by {kind}, which is not supported; choose a model with one of "
            f"{', '.join(_SUPPORTED)}, such as wav2vec2, Whisper or AST"
        )
    if kind == "ASTFeatureExtractor" and found.max_length != config.max_length:
        raise ModelError(
            f"{source}: its feature extractor makes {found.max_length} frames, but the model reads "
            f"{config.max_length}; set max_length in preprocessor_config.json to that"
        )
    return found
