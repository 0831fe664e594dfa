"""Loads and saves models from Hub ids, folders, GGUF files and samples."""

from fedtune.models.load import (
    class_names,
    load_feature_extractor,
    load_model,
    load_tokenizer,
    preprocessor,
    save_config,
    save_model,
)

__all__ = [
    "class_names",
    "load_feature_extractor",
    "load_model",
    "load_tokenizer",
    "preprocessor",
    "save_config",
    "save_model",
]
