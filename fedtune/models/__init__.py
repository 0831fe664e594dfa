"""Where models come from: hub ids, folders, GGUF files and samples, all through one loader."""

from fedtune.models.load import load, preprocessor, reader, save, settled, tokenizer

__all__ = ["load", "preprocessor", "reader", "save", "settled", "tokenizer"]
