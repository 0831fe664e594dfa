"""Pictures of every depth and kind become bytes of red, green and blue, or are refused by name."""

import contextlib
import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image, Value
from PIL import Image as Picture

from fedtune import data, tasks
from fedtune.data.decode import Unreadable, decode
from fedtune.data.loaded import as_table
from fedtune.errors import DataError
from fedtune.recipe.preprocessor_settings import Preprocessor
from tests.data_examples import a_recipe

LEVELS = np.array([[0, 257 * 3, 257 * 200], [128, 129, 65535]], np.uint16)


def stored(image: Picture.Image, form: str = "PNG") -> dict[str, Any]:
    content = io.BytesIO()
    image.save(content, form)
    return {"bytes": content.getvalue(), "path": None}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_to_eight(form: str) -> None:
    found = decode(stored(Picture.fromarray(LEVELS), form), "x")
    assert found[..., 0].tolist() == [[0, 3, 200], [0, 1, 255]]
    assert (found == found[..., :1]).all()


def test_a_sixteen_bit_picture_in_a_whole_numbers_mode_is_scaled_too() -> None:
    found = decode(stored(Picture.fromarray(LEVELS.astype(np.int32)), "TIFF"), "x")
    assert found[..., 0].tolist() == [[0, 3, 200], [0, 1, 255]]


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (Picture.fromarray(np.array([[0, 70000]], np.int32)), "more than 16 bits"),
        (Picture.fromarray(np.array([[0.0, 1.0]], np.float32)), "real numbers of unknown range"),
    ],
)
def test_a_picture_of_unknown_range_is_refused_by_name(image: Picture.Image, sentence: str) -> None:
    with pytest.raises(Unreadable, match=rf"^scan\.tif cannot be read as an image \(.*{sentence}"):
        decode(stored(image, "TIFF"), "scan.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_other_kind_of_picture_becomes_three_channels(mode: str) -> None:
    image = Picture.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    found = decode(stored(image, "TIFF"), "x")
    assert found.shape == (4, 5, 3)
    assert found.min() >= 254


def test_a_picture_is_turned_upright_as_its_camera_noted() -> None:
    image = Picture.fromarray(np.array([[0, 255]], np.uint8))
    exif = Picture.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    image.save(content, "PNG", exif=exif)
    assert decode({"bytes": content.getvalue(), "path": None}, "x")[..., 0].tolist() == [[0], [255]]


def pictures(paths: list[str]) -> data.Table:
    features = Features({"image": Image(), "label": Value("int64")})
    return as_table(Dataset.from_dict({"image": paths, "label": [0] * len(paths)}, features=features))


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Picture.fromarray(noise).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:900])
    found = pictures([str(tmp_path / "good.jpg"), str(tmp_path / "cut.jpg")])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read as an image \(.*truncated.*data\.skip_unreadable"):
        tasks.encode_examples(found, a_recipe("task=image-classification"), Preprocessor())


def test_a_damaged_picture_without_a_path_is_named_by_its_row() -> None:
    good = stored(Picture.new("L", (4, 4)))
    features = Features({"image": Image(), "label": Value("int64")})
    found = as_table(
        Dataset.from_dict({"image": [good, {"bytes": b"oops", "path": None}], "label": [0, 0]}, features=features)
    )
    with pytest.raises(DataError, match=r"^the image in row 2 cannot be read as an image"):
        tasks.encode_examples(found, a_recipe("task=image-classification"), Preprocessor())


def test_sixteen_bit_arrays_are_scaled_too() -> None:
    features = Features({"image": Array2D((2, 3), "uint16"), "label": Value("int64")})
    found = as_table(Dataset.from_dict({"image": [LEVELS], "label": [0]}, features=features))
    batch = tasks.encode_examples(
        found, a_recipe("task=image-classification"), Preprocessor(side=3, resample="nearest")
    )
    assert torch.equal(batch.pixels[0, 0], torch.tensor([[0, 3, 200], [0, 1, 255]], dtype=torch.uint8))  # type: ignore[attr-defined]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_camera_is_turned_upright(orientation: int) -> None:
    """The oracle undoes the rotations and mirrorings of the EXIF standard by array operations."""
    upright = np.arange(48, dtype=np.uint8).reshape(2, 8, 3)
    stored_as = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }
    exif = Picture.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Picture.fromarray(np.ascontiguousarray(stored_as[orientation])).save(content, "PNG", exif=exif)
    assert (decode({"bytes": content.getvalue(), "path": None}, "x") == upright).all()


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning() -> None:
    image = Picture.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    for transparency in (1, bytes([255, 0])):
        content = io.BytesIO()
        image.save(content, "PNG", transparency=transparency)
        found = decode({"bytes": content.getvalue(), "path": None}, "x")
        assert found.tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_a_print_jpeg_is_not_a_negative() -> None:
    """Adobe stores the four inks of a JPEG inverted."""
    image = Picture.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    found = decode(stored(image, "JPEG"), "x")
    assert np.abs(found.astype(int) - [200, 30, 60]).max() <= 3


def test_sixteen_bit_greys_with_the_largest_byte_first_are_read_alike() -> None:
    image = Picture.frombytes("I;16B", (3, 2), LEVELS.astype(">u2").tobytes())
    assert decode(stored(image, "TIFF"), "x")[..., 0].tolist() == [[0, 3, 200], [0, 1, 255]]


def test_damaged_camera_notes_are_refused_by_name_or_ignored() -> None:
    """Bytes of the notes are replaced at random; some make Pillow raise struct.error when it turns the picture."""
    exif = Picture.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = io.BytesIO()
    Picture.new("RGB", (16, 8)).save(content, "JPEG", exif=exif)
    chance = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(content.getvalue())
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randint(12, 70)] = chance.randint(0, 255)
        with contextlib.suppress(Unreadable), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode({"bytes": bytes(damaged), "path": None}, "x")
