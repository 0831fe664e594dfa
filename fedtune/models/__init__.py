"""Where models come from: hub ids, folders, GGUF files and samples, all through one loader."""

from fedtune.models.load import class_names, load, preprocessor, reader, save, save_config, settled, tokenizer

__all__ = ["class_names", "load", "preprocessor", "reader", "save", "save_config", "settled", "tokenizer"]
