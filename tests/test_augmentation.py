"""Training images are changed at random, the same in every process; those of evaluation never."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.data.augmentation import AugmentedPictures, Change, apply_change, draw_change
from fedtune.data.pixels import EncodedPictures
from fedtune.errors import RecipeError
from fedtune.recipe.augmentation_settings import Augmentation
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.training import get_run_context
from fedtune.training.training_rows import make_training_rows
from tests.federations import execute
from tests.task_cases import task_recipe
from tests.test_export import state

SIDE = 16
EVERYTHING = "train.augmentation={horizontal_flip: true, random_resized_crop: 0.5, colour_jitter: 0.2}"


def encoded(channels: int = 3, count: int = 6) -> EncodedPictures:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, channels, SIDE, SIDE), np.uint8))
    return EncodedPictures(pixels, Preprocessor(side=SIDE), torch.arange(count), None, fitted=True)


def an_image() -> Tensor:
    return encoded().make_images([0])[0]


def test_mirrored_twice_is_the_image() -> None:
    once = apply_change(an_image(), Change(flipped=True), encoded())
    assert not torch.equal(once, an_image())
    assert torch.equal(once[..., 0], an_image()[..., -1])
    assert torch.equal(apply_change(once, Change(flipped=True), encoded()), an_image())


def slow_crop(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Enlarge a crop bilinearly, one pixel at a time."""
    top, left, height, width = box
    found = np.zeros_like(image)
    for y in range(SIDE):
        for x in range(SIDE):
            v = min(max((y + 0.5) * height / SIDE - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / SIDE - 0.5, 0), width - 1)
            v0, u0 = int(v), int(u)
            v1, u1 = min(v0 + 1, height - 1), min(u0 + 1, width - 1)
            for row, rows in ((v0, 1 - (v - v0)), (v1, v - v0)):
                for column, columns in ((u0, 1 - (u - u0)), (u1, u - u0)):
                    found[:, y, x] += rows * columns * image[:, top + row, left + column]
    return found


@pytest.mark.parametrize("box", [(0, 0, SIDE, SIDE), (3, 2, 9, 11), (15, 0, 1, 16), (5, 5, 1, 1)])
def test_a_crop_is_that_of_a_slow_twin(box: tuple[int, int, int, int]) -> None:
    found = apply_change(an_image(), Change(box=box), encoded())
    np.testing.assert_allclose(found.numpy(), slow_crop(an_image().numpy().astype(np.float64), box), atol=1e-3)


def test_colours_are_those_of_pillows_enhancers() -> None:
    from PIL import Image, ImageEnhance

    change = Change(brightness=0.8, contrast=1.2, saturation=0.7)
    picture = Image.fromarray(an_image().byte().permute(1, 2, 0).numpy())
    steps = ((ImageEnhance.Brightness, 0.8), (ImageEnhance.Contrast, 1.2), (ImageEnhance.Color, 0.7))
    for enhancer, factor in steps:
        picture = enhancer(picture).enhance(factor)
    found = apply_change(an_image(), change, encoded()).permute(1, 2, 0).numpy()
    assert np.abs(found - np.asarray(picture)).max() <= 3  # Pillow rounds after each step


def test_a_grey_image_stays_grey_and_its_saturation_means_nothing() -> None:
    image = encoded(channels=1).make_images([0])[0]
    one, other = (apply_change(image, Change(brightness=0.9, saturation=s), encoded(1)) for s in (0.5, 1.5))
    assert one.shape == image.shape
    torch.testing.assert_close(one, other)


def test_what_is_drawn_is_spread_as_the_settings_say() -> None:
    settings = Augmentation(horizontal_flip=True, random_resized_crop=0.5, colour_jitter=0.2)
    drawn = [draw_change(settings, 100, 7, step, row) for step in range(40) for row in range(50)]
    assert np.mean([one.flipped for one in drawn]) == pytest.approx(0.5, abs=0.04)
    boxes = np.array([one.box for one in drawn])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 100).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 100).all()
    areas, ratios = boxes[:, 2] * boxes[:, 3] / 1e4, boxes[:, 3] / boxes[:, 2]
    assert areas.min() > 0.48
    assert areas.min() < 0.52
    assert areas.max() > 0.95
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)
    for name in ("brightness", "contrast", "saturation"):
        factors = np.array([getattr(one, name) for one in drawn])
        assert factors.mean() == pytest.approx(1, abs=0.01)
        assert factors.std() == pytest.approx(0.4 / np.sqrt(12), abs=0.005)  # uniform from 0.8 to 1.2


def test_what_is_drawn_depends_on_seed_step_and_row_alone() -> None:
    settings = Augmentation(horizontal_flip=True, random_resized_crop=0.5, colour_jitter=0.2)
    one = AugmentedPictures(encoded(), settings, seed=1, step=2)
    batch = one.make_batch([0, 3, 5])
    assert torch.equal(batch["labels"], torch.tensor([0, 3, 5]))
    assert torch.equal(batch["pixel_values"][1:2], one.make_batch([3])["pixel_values"])
    for seed, step in ((2, 2), (1, 3)):
        other = AugmentedPictures(encoded(), settings, seed, step).make_batch([0, 3, 5])
        assert not torch.equal(other["pixel_values"], batch["pixel_values"])
    assert len({draw_change(settings, 99, 1, 2, row) for row in range(50)}) == 50


def test_only_the_examples_of_a_training_step_change(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("image-classification", tmp_path, EVERYTHING)
    context = get_run_context(recipe.model_dump_json())
    plain = task_recipe("image-classification", tmp_path)
    before = get_run_context(plain.model_dump_json())
    for part in ("validation", "test", "train"):
        one, other = (getattr(each, part).make_batch(range(5))["pixel_values"] for each in (context, before))
        assert torch.equal(one, other)
    rows = make_training_rows(context.train, context.client_rows[0], recipe.train, lambda purpose: len(purpose))
    assert not torch.equal(
        rows.at_step(0).make_batch(range(5))["pixel_values"], context.train.make_batch(range(5))["pixel_values"]
    )


def test_runs_with_and_without_augmentation_are_reproducible_and_differ(home: Path, tmp_path: Path) -> None:
    changed = task_recipe("image-classification", tmp_path, EVERYTHING, "federation.rounds=2")
    plain = task_recipe("image-classification", tmp_path, "federation.rounds=2")
    first, second, other = (state(execute(one, run=f"run-{n}")) for n, one in enumerate((changed, changed, plain)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("case", "setting", "sentence"),
    [
        ("text-classification", "{horizontal_flip: true}", "text-classification has no images to change"),
        ("image-classification", "{}", "nothing is set, so no image changes"),
        ("image-classification", "{random_resized_crop: 1.2}", "less than or equal to 1"),
        ("image-classification", "{colour_jitter: 0.1, color_jitter: 0.1}", r"unknown key '.*color_jitter'"),
        ("image-classification", "{vertical_flip: true}", r"unknown key '.*vertical_flip'"),
    ],
)
def test_settings_that_change_nothing_are_refused(case: str, setting: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        task_recipe(case, tmp_path, f"train.augmentation={setting}")


def test_the_american_spelling_is_accepted() -> None:
    assert Augmentation.model_validate({"color_jitter": 0.3}) == Augmentation(colour_jitter=0.3)
