"""Pictures are read as the model's own preprocessor reads them: transformers' image processors are the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from numpy.typing import NDArray
from PIL import Image as Picture
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from fedtune import models, tasks
from fedtune.data.loaded import as_table
from fedtune.errors import ModelError
from fedtune.models.preprocessor import from_settings, save
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings, Recipe
from fedtune.training import get_run_context
from tests.data_examples import a_recipe
from tests.federations import execute, trivial

IMAGES = "task=image-classification"
LEVEL = 1.01
"""Pillow and torch round to neighbouring levels of 0 to 255."""

PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "vit of an old version": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2},
    "vit without normalising": {"image_processor_type": "ViTImageProcessor", "size": 32, "do_normalize": False},
    "vit in the nearest pixels' colours": {"image_processor_type": "ViTImageProcessor", "size": 32, "resample": 0},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 36, "width": 36}, "crop_size": 32},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875},
    "convnext, large": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "mobilevit": {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 32},
    "mobilevit with a margin": {
        "image_processor_type": "MobileViTImageProcessor",
        "size": {"shortest_edge": 21},
        "crop_size": 32,
    },
    "mobilenet": {"image_processor_type": "MobileNetV2ImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 32},
    "efficientnet": {"image_processor_type": "EfficientNetImageProcessor", "size": 32, "rescale_offset": True},
    "efficientnet, once": {"image_processor_type": "EfficientNetImageProcessor", "size": 32, "include_top": False},
    "levit": {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32},
    "poolformer": {
        "image_processor_type": "PoolFormerImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": 32,
        "crop_pct": 0.9,
    },
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    "beit": {
        "image_processor_type": "BeitImageProcessor",
        "size": {"height": 36, "width": 36},
        "do_center_crop": False,
    },
    "other colours": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.5, 0.7],
        "image_std": [0.2, 0.3, 0.5],
        "rescale_factor": 1 / 127.5,
    },
}


def a_picture(width: int, height: int) -> Picture.Image:
    """Smooth waves, with fine detail in one corner."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c)) * np.cos(y / (5 + c)) for c in range(3)]
    pixels = (np.stack(waves, -1) + 1) * 127.5
    pixels[: height // 3, : width // 3] = np.random.default_rng(0).integers(0, 256, (height // 3, width // 3, 3))
    return Picture.fromarray(pixels.astype(np.uint8))


def a_folder(path: Path, settings: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 48}))
    (path / "model.safetensors").write_bytes(b"")
    if settings:
        (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def read_by(preprocessor: Preprocessor, pictures: list[Picture.Image]) -> NDArray[np.float32]:
    features = Features({"image": Image(), "label": Value("int64")})
    held = as_table(Dataset.from_dict({"image": pictures, "label": [0] * len(pictures)}, features=features))
    encoded = tasks.encode_examples(held, a_recipe(IMAGES), preprocessor)
    return encoded.make_batch(range(len(pictures)))["pixel_values"].numpy()


def assert_alike(found: NDArray[np.float32], expected: NDArray[np.float32], preprocessor: Preprocessor) -> None:
    """Within a level, but for a few of a bicubic filter's overshoots, which Pillow clips after another pass first."""
    off = np.abs(found - expected) / (preprocessor.scale / np.array(preprocessor.std).reshape(-1, 1, 1))
    assert np.quantile(off, 0.98 if preprocessor.resample == "bicubic" else 1.0) <= LEVEL
    assert off.max() <= 12
    assert off.mean() < 0.35


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_models_own_preprocessor(name: str, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", PROCESSORS[name])
    theirs = AutoImageProcessor.from_pretrained(folder)
    pictures = [a_picture(70, 50), a_picture(40, 90), a_picture(32, 32)]
    expected = np.stack([theirs(picture, return_tensors="np")["pixel_values"][0] for picture in pictures])
    ours = models.preprocessor(ModelSettings(source=f"path:{folder}"))
    found = read_by(ours, pictures)
    assert found.shape == expected.shape
    assert_alike(found, expected, ours)


def test_a_run_reads_pictures_as_the_models_preprocessor_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["other colours"]))
    for number in range(40):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        a_picture(40 + number, 50).save(folder / f"{number:02}.png")
    source, pictures = f"model.source=path:{tmp_path / 'model'}", f"data.source=folder:{tmp_path / 'pictures'}"
    shop = get_run_context(a_recipe(IMAGES, source, pictures, "train.image_size=null").model_dump_json())
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "model")
    expected = theirs([picture["path"] for picture in shop.corpus.train.pictures()], return_tensors="np")[
        "pixel_values"
    ]
    assert shop.recipe.model.preprocessor is not None
    found = shop.train.make_batch(range(len(shop.train)))["pixel_values"]
    assert_alike(found.numpy(), expected, shop.recipe.model.preprocessor)
    assert shop.model(pixel_values=found).logits.shape == (len(shop.train), 2)
    assert get_run_context(shop.recipe.model_dump_json()) is shop


def test_a_run_records_how_it_read_pictures(home: Path) -> None:
    recipe = trivial("train.image_size=null", "federation.rounds=1")
    assert recipe.model.preprocessor is None
    ended = execute(recipe)
    recorded = Recipe.model_validate_json(ended.run.recipe)
    assert recorded.model.preprocessor == Preprocessor(side=96)
    assert recorded.train.image_size == 96


def test_small_pictures_of_one_size_are_kept_small_and_read_alike(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", PROCESSORS["mobilenet"])
    theirs = AutoImageProcessor.from_pretrained(folder)
    pictures = [a_picture(20, 28), a_picture(20, 28)]
    expected = np.stack([theirs(picture, return_tensors="np")["pixel_values"][0] for picture in pictures])
    ours = models.preprocessor(ModelSettings(source=f"path:{folder}"))
    assert_alike(read_by(ours, pictures), expected, ours)


def test_without_a_preprocessor_the_size_is_the_configurations(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", {})
    assert models.preprocessor(ModelSettings(source=f"path:{folder}")) == Preprocessor(side=48)


def test_another_size_keeps_the_share_that_is_cut_out(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", PROCESSORS["mobilenet"])
    recipe = a_recipe(IMAGES, f'model.source="path:{folder}"', "train.image_size=64")
    found = tasks.resolve_reader(recipe)
    assert found.train.image_size == 64
    assert found.model.preprocessor is not None
    assert (found.model.preprocessor.side, found.model.preprocessor.edge) == (64, 72)
    assert tasks.resolve_reader(found) == found


def test_what_a_recipe_records_counts_more_than_the_folder(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "model", PROCESSORS["vit"])
    recipe = tasks.resolve_reader(a_recipe(IMAGES, "train.image_size=null", f'model.source="path:{folder}"'))
    a_folder(folder, PROCESSORS["other colours"])
    assert tasks.load_reader(recipe) == recipe.model.preprocessor
    assert tasks.load_reader(recipe).side == 32


@pytest.mark.parametrize("name", [name for name in PROCESSORS if "mobilevit" not in name and name != "efficientnet"])
def test_a_saved_preprocessor_is_read_back_and_is_one_of_transformers(name: str, tmp_path: Path) -> None:
    settings = {**AutoImageProcessor.from_pretrained(a_folder(tmp_path / "a", PROCESSORS[name])).to_dict()}
    ours = from_settings(settings, "a model")
    save(ours, a_folder(tmp_path / "b", {}))
    assert models.preprocessor(ModelSettings(source=f"path:{tmp_path / 'b'}")) == ours
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "b")
    picture = a_picture(70, 50)
    expected = theirs(picture, return_tensors="np")["pixel_values"]
    assert_alike(read_by(ours, [picture]), expected, ours)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": {"height": 32, "width": 40}}, "which is not square; set model.preprocessor"),
        ({"resample": 1}, "resamples by filter 1, but only nearest"),
        ({"image_std": [0.5, 0, 0.5]}, "preprocessor_config.json: std.1 is 0.0, but must be greater than 0"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "normalises 1 channels instead of three"),
        ({"do_resize": False}, "does not resize images"),
        *(
            ({"image_processor_type": f"{name}ImageProcessor"}, f"{name}ImageProcessor does more than resize, crop")
            for name in ("Perceiver", "TextNet", "Donut", "Siglip2", "ImageGPT")
        ),
    ],
)
def test_a_preprocessor_that_cannot_be_followed_is_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = a_folder(tmp_path / "model", {**PROCESSORS["vit"], **change})
    with pytest.raises(ModelError, match=sentence):
        models.preprocessor(ModelSettings(source=f"path:{folder}"))


def test_models_without_a_file_read_pixels_as_they_always_did() -> None:
    found = torch.from_numpy(read_by(Preprocessor(side=8), [a_picture(8, 8)]))
    pixels = torch.from_numpy(np.array(a_picture(8, 8))).permute(2, 0, 1)[None]
    assert torch.equal(found, (pixels.float() - 127) / 128)
    assert models.preprocessor(ModelSettings(source="sample:logistic")) == Preprocessor()
