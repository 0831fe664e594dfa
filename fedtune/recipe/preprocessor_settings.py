"""Image preprocessing. A recipe records it, so that every machine processes images alike."""

from typing import Annotated, Literal, Self

from pydantic import Field

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["Preprocessor", "Resample"]

Resample = Literal["nearest", "bilinear", "bicubic"]
Triple = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class Preprocessor(SettingsModel):
    """An image is resized and centre-cropped, and each channel becomes ``(pixel * scale - mean) / std``.

    The defaults apply to models without a ``preprocessor_config.json``.
    """

    side: int = Field(96, ge=1, le=4096, description="height and width of what the model reads, in pixels")
    edge: int | None = Field(None, ge=1, le=8192, description="pixels before the middle is cut out; by default side")
    resize: Literal["both", "shortest"] = Field(
        "both", description="edges that become `edge` long: both, or the shortest, which keeps proportions"
    )
    resample: Resample = "bilinear"
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = Field(1.0, gt=0, description="what a pixel of 0 to 255 is multiplied by")
    mean: Triple = (127.0, 127.0, 127.0)
    std: tuple[Positive, Positive, Positive] = (128.0, 128.0, 128.0)

    def scaled_to(self, side: int | None) -> Self:
        """Return the settings for an input size of ``side`` pixels, with the same relative crop."""
        if side is None or side == self.side:
            return self
        edge = None if self.edge is None else max(1, round(self.edge * side / self.side))
        return self.model_copy(update={"side": side, "edge": edge})
