"""Layers whose weights a model reads without calling the layer. Such layers cannot be replaced."""

from torch import nn

__all__ = ["read_past"]

_ENDINGS = {
    "deberta": ("rel_embeddings",),
    "deberta-v2": ("rel_embeddings",),
    "falcon_h1": ("out_proj", "conv1d"),
    "falcon_mamba": ("out_proj", "conv1d", "dt_proj"),
    "mamba": ("out_proj", "conv1d", "dt_proj"),
    "mamba2": ("out_proj", "conv1d"),
    "nemotron_h": ("out_proj", "conv1d"),
}
"""Endings of the layer names by model type. PEFT refuses most of them too."""


def read_past(model: nn.Module) -> list[str]:
    """Return the names of such layers in a model."""
    endings = _ENDINGS.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings]
