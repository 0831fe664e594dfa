"""Where models come from: hub ids, folders, GGUF files and samples, all through one loader."""

from fedtune.models.load import class_names, load, save, save_config, tokenizer

__all__ = ["class_names", "load", "save", "save_config", "tokenizer"]
