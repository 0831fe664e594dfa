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

    side: int = Field(96, ge=1, le=4096, description="height and width of the model's input, in pixels")
    edge: int | None = Field(None, ge=1, le=8192, description="size in pixels before the centre crop; default: side")
    resize: Literal["both", "shortest"] = Field(
        "both", description="edges that are resized to `edge`: both, or the shortest, which keeps the aspect ratio"
    )
    resample: Resample = "bilinear"
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = Field(1.0, gt=0, description="factor of the pixel values 0 to 255")
    mean: Triple = (127.0, 127.0, 127.0)
    std: tuple[Positive, Positive, Positive] = (128.0, 128.0, 128.0)

    def scaled_to(self, side: int | None) -> Self:
        """Return the settings for an input size of ``side`` pixels, with the same relative crop."""
        if side is None or side == self.side:
            return self
        edge = None if self.edge is None else max(1, round(self.edge * side / self.side))
        return self.model_copy(update={"side": side, "edge": edge})
