"""Layers whose weights a model takes without running the layer, so that nothing can stand in the layer's place."""

from torch import nn

__all__ = ["read_past"]

_ENDINGS = {
    "falcon_h1": ("out_proj", "conv1d"),
    "falcon_mamba": ("out_proj", "conv1d", "dt_proj"),
    "mamba": ("out_proj", "conv1d", "dt_proj"),
    "mamba2": ("out_proj", "conv1d"),
    "nemotron_h": ("out_proj", "conv1d"),
}
"""Last parts of their names, by model type; most of them PEFT refuses too."""


def read_past(model: nn.Module) -> list[str]:
    """Names of such layers."""
    endings = _ENDINGS.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings]
