"""Position interpolation: a rotary model reads longer texts with its positions squeezed into those that it knows.

Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (arXiv 2306.15595): token
i gets the angles of position i / factor. The factor stands in the saved configuration as transformers' linear scaling.
"""

import math
from typing import Any

from torch import nn

from fedtune.errors import ModelError
from fedtune.recipe.schema import ModelSettings

__all__ = ["interpolate_positions", "refuse_interpolation", "require_interpolation"]


def interpolate_positions(model: ModelSettings, config: Any) -> None:
    """Write the factor into a configuration; ModelError where it has no rotary positions, or scaled ones."""
    factor = model.position_interpolation
    if factor == 1:
        return
    text = config.get_text_config()
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") is None or getattr(text, "alibi", False):
        refuse_interpolation(model)
    if rope["rope_type"] != "default":
        raise ModelError(
            f"{model.source} already scales its positions ({rope['rope_type']}); set model.position_interpolation to 1"
        )
    text.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
    text.max_position_embeddings = math.ceil(factor * text.max_position_embeddings)


def require_interpolation(model: ModelSettings, loaded: nn.Module) -> None:
    """ModelError for a model that does not look at the factor."""
    squeezed = any(getattr(layer, "rope_type", None) == "linear" for layer in loaded.modules())
    if model.position_interpolation != 1 and not squeezed:
        refuse_interpolation(model)


def refuse_interpolation(model: ModelSettings) -> None:
    """ModelError unless the factor is 1."""
    if model.position_interpolation != 1:
        raise ModelError(f"{model.source} has no rotary positions; set model.position_interpolation to 1")
