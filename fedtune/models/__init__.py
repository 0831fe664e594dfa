"""Where models come from: hub ids, folders, GGUF files and samples, all through one loader."""

from fedtune.models.load import load, save, tokenizer

__all__ = ["load", "save", "tokenizer"]
