"""Where models come from: hub ids, folders, GGUF files and samples, all through one loader."""

from fedtune.models.load import load, tokenizer

__all__ = ["load", "tokenizer"]
