"""Random changes to training images: mirrored, cropped and in other colours.

What is drawn for an image depends on the seed, the step and the image's row, not on the batch around it. Images
have the model's input size and values 0 to 255 here; the model's normalisation follows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtune.data.pixels import EncodedPictures, resize
from fedtune.recipe.augmentation_settings import Augmentation

__all__ = ["AugmentedPictures", "Change", "apply_change", "draw_change"]

_ASPECT = math.log(4 / 3)
"""Crops are up to a third wider or higher than the image's own aspect ratio, as in Inception's training."""
_TRIES = 10
_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the grey level of ITU-R 601."""


@dataclass(frozen=True)
class Change:
    """What is done to one image. ``box`` is (top, left, height, width) of the crop."""

    flipped: bool = False
    box: tuple[int, int, int, int] | None = None
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclass(frozen=True)
class AugmentedPictures:
    """Images as one training step sees them. ``seed`` is that of the client's round and ``step`` counts its steps."""

    pictures: EncodedPictures
    settings: Augmentation
    seed: int
    step: int
    lengths: None = None

    @property
    def domains(self) -> list[str] | None:
        """The domains of the images."""
        return self.pictures.domains

    def __len__(self) -> int:
        return len(self.pictures)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of ``EncodedPictures``, with each image changed at random."""
        images = self.pictures.make_images(indices)
        changes = [draw_change(self.settings, images.shape[-1], self.seed, self.step, row) for row in indices]
        changed = [self._apply(image, change) for image, change in zip(images, changes, strict=True)]
        return self.pictures.normalise(torch.stack(changed), indices)

    def _apply(self, image: Tensor, change: Change) -> Tensor:
        return apply_change(image, change, self.pictures)


def draw_change(settings: Augmentation, side: int, seed: int, step: int, row: int) -> Change:
    """Draw the change to the image in ``row`` in one step. All images draw equally many numbers for each setting."""
    random = np.random.default_rng([seed, step, row])
    flipped = settings.horizontal_flip and bool(random.random() < 0.5)
    box = None if settings.random_resized_crop is None else _draw_box(random, settings.random_resized_crop, side)
    if not settings.colour_jitter:
        return Change(flipped, box)
    return Change(flipped, box, *(1 + settings.colour_jitter * random.uniform(-1, 1, 3)).tolist())


def _draw_box(random: np.random.Generator, smallest: float, side: int) -> tuple[int, int, int, int]:
    """Draw a crop of an area and an aspect ratio that fit into the image; after ten that do not, take all of it."""
    for _ in range(_TRIES):
        area = random.uniform(smallest, 1) * side * side
        ratio = math.exp(random.uniform(-_ASPECT, _ASPECT))
        width, height = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if width <= side and height <= side:
            top, left = random.integers(side - height + 1), random.integers(side - width + 1)
            return int(top), int(left), height, width
    return 0, 0, side, side


def apply_change(image: Tensor, change: Change, pictures: EncodedPictures) -> Tensor:
    """Change an image [1 or 3, side, side] in 0..255: crop, mirror, then colours. The size stays."""
    if change.box is not None:
        top, left, height, width = change.box
        cut = image[None, :, top : top + height, left : left + width]
        image = resize(cut, (image.shape[1], image.shape[2]), pictures.preprocessor)[0]
    if change.flipped:
        image = image.flip(-1)
    return _change_colours(image, change)


def _change_colours(image: Tensor, change: Change) -> Tensor:
    """Multiply brightness, then the distance from the mean grey level, then that from each pixel's own grey level."""
    if (change.brightness, change.contrast, change.saturation) == (1.0, 1.0, 1.0):
        return image
    image = (image * change.brightness).clamp(0, 255)
    mean = _grey(image).mean()
    image = (mean + (image - mean) * change.contrast).clamp(0, 255)
    grey = _grey(image)
    return (grey + (image - grey) * change.saturation).clamp(0, 255)


def _grey(image: Tensor) -> Tensor:
    """Return the grey levels [1, h, w] of an image [1 or 3, h, w]."""
    if len(image) == 1:
        return image
    return (image * torch.tensor(_LUMA).reshape(3, 1, 1)).sum(0, keepdim=True)
