"""The result of a run for transformers or PEFT: a PEFT adapter, or a whole safetensors model."""

from fedtune.export.export_model import Format, describe_missing_tensors, export_model, write_export

__all__ = ["Format", "describe_missing_tensors", "export_model", "write_export"]
