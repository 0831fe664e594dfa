"""Images as pixels that can be batched, and the preprocessing of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.data.decode import decode, describe_picture
from fedtune.data.table import Pictures, Table
from fedtune.recipe.preprocessor_settings import Preprocessor, Resample

__all__ = ["EncodedPictures", "encode_pictures", "resize"]


@dataclass(frozen=True)
class EncodedPictures:
    """Pixels uint8 [n, 1 or 3, h, w] and the preprocessor.

    ``fitted`` means that they already have the model's input size.
    """

    pixels: Tensor
    preprocessor: Preprocessor
    labels: Tensor
    domains: list[str] | None
    fitted: bool = False
    lengths: None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return pixel_values float32 [k, 3, side, side], normalised by the preprocessor, and labels [k]."""
        return self.normalise(self.make_images(indices), indices)

    def make_images(self, indices: Sequence[int]) -> Tensor:
        """Return images of the model's input size, float32 [k, 1 or 3, side, side] in 0..255."""
        chosen = self.pixels[torch.as_tensor(indices)].float()
        return chosen if self.fitted else _fit(chosen, self.preprocessor)

    def normalise(self, images: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of images that have the model's input size."""
        labels = self.labels[torch.as_tensor(indices)]
        return {"pixel_values": _normal(images, self.preprocessor), "labels": labels}


def encode_pictures(table: Table, preprocessor: Preprocessor, labels: Tensor) -> EncodedPictures:
    """Encode the column ``image`` with ``labels`` [n, ...]; DataError for an image that cannot be decoded."""
    found, fitted = _read_pixels(table, preprocessor)
    return EncodedPictures(found, preprocessor, labels, table.domains, fitted)


def _read_pixels(table: Table, preprocessor: Preprocessor) -> tuple[Tensor, bool]:
    """Return pixels uint8 [n, c, h, w] and whether they have the model's input size.

    Small images of one size are not resized here. Raises Unreadable for an image that cannot be decoded.
    """
    if not isinstance(table.kinds["image"], Pictures):
        return _arrays(table).unsqueeze(1), False
    kept: list[Tensor] = []
    fitted: list[bool] = []
    for row, picture in enumerate(table.pictures()):
        image = torch.from_numpy(decode(picture, describe_picture(picture, row)).copy()).permute(2, 0, 1)
        fitted.append(max(image.shape) > preprocessor.side)
        kept.append(_rounded(image, preprocessor) if fitted[-1] else image)
    if not any(fitted) and len({image.shape for image in kept}) == 1:
        return torch.stack(kept), False
    pairs = zip(kept, fitted, strict=True)
    return torch.stack([image if done else _rounded(image, preprocessor) for image, done in pairs]), True


def _rounded(image: Tensor, preprocessor: Preprocessor) -> Tensor:
    """Fit an image to the input size: uint8 [c, h, w] -> uint8 [c, side, side]."""
    if preprocessor.resample != "bilinear":
        resized = _resize_by_pillow(image, _shape_before_crop(image, preprocessor), preprocessor.resample)
        return _middle(resized[None], preprocessor.side)[0]
    return _fit(image[None].float(), preprocessor)[0].round().byte()


def _resize_by_pillow(image: Tensor, shape: tuple[int, int], resample: Resample) -> Tensor:
    """Resize an image uint8 [c, h, w] by a filter of Pillow.

    torch clips the overshoots of ``bicubic`` in another order and picks other pixels for ``nearest``.
    """
    import PIL.Image  # imported here: data without encoded images does not need Pillow

    picture = PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = np.array(picture.resize(shape[::-1], PIL.Image.Resampling[resample.upper()]))
    return torch.from_numpy(resized).permute(2, 0, 1)


def _arrays(table: Table) -> Tensor:
    """Return a column of arrays as uint8 [n, h, w]. 16-bit values are scaled to 8 bits."""
    grey = table.greys()
    return torch.from_numpy(np.round(grey / 257).astype(np.uint8) if grey.dtype == np.uint16 else grey.copy())


def _fit(images: Tensor, preprocessor: Preprocessor) -> Tensor:
    """Resize and centre-crop float images: [n, c, h, w] in 0..255 -> [n, c, side, side]."""
    shape = _shape_before_crop(images, preprocessor)
    return _middle(resize(images, shape, preprocessor), preprocessor.side)


def _shape_before_crop(images: Tensor, preprocessor: Preprocessor) -> tuple[int, int]:
    """Return the height and width that images [..., h, w] are resized to."""
    height, width = images.shape[-2:]
    edge = preprocessor.edge or preprocessor.side
    return (edge, edge) if preprocessor.resize == "both" else _shortest(height, width, edge)


def _shortest(height: int, width: int, edge: int) -> tuple[int, int]:
    """Return the height and width whose shorter side is ``edge``, keeping the aspect ratio."""
    if height <= width:
        return edge, max(1, edge * width // height)
    return max(1, edge * height // width), edge


def resize(images: Tensor, shape: tuple[int, int], preprocessor: Preprocessor) -> Tensor:
    """Resize float images [n, c, h, w] in 0..255 by the preprocessor's filter."""
    if images.shape[-2:] == shape:
        return images
    if preprocessor.resample == "nearest":
        return F.interpolate(images, size=shape, mode="nearest-exact")
    if preprocessor.resample == "bicubic":  # on uint8, torch clips overshoot like Pillow
        return F.interpolate(images.round().byte(), size=shape, mode="bicubic", antialias=True).float()
    return F.interpolate(images, size=shape, mode="bilinear", antialias=True)


def _middle(images: Tensor, side: int) -> Tensor:
    """Crop the central ``side`` x ``side`` pixels. Smaller images get a black margin."""
    height, width = images.shape[-2:]
    if (height, width) == (side, side):
        return images
    top, left = (height - side) // 2, (width - side) // 2
    return F.pad(images, (-left, side - width + left, -top, side - height + top))


def _normal(images: Tensor, preprocessor: Preprocessor) -> Tensor:
    """Normalise images: [n, 1 or 3, h, w] in 0..255 -> [n, 3, h, w]."""
    mean, std = _channels(preprocessor.mean), _channels(preprocessor.std)
    ordered = images.flip(1) if preprocessor.channels == "bgr" else images
    scaled = ordered if preprocessor.scale == 1.0 else ordered * preprocessor.scale
    return ((scaled - mean) / std).expand(-1, 3, -1, -1)


def _channels(values: tuple[float, float, float]) -> Tensor:
    """Return [3, 1, 1], or [1, 1, 1] if all channels are equal, so that a grey image stays one channel in memory."""
    return torch.tensor(values[:1] if len(set(values)) == 1 else values).reshape(-1, 1, 1)
