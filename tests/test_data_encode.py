from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image, Value
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fedtune import data, tasks
from fedtune.data.loaded import as_table
from fedtune.errors import DataError, ModelError
from fedtune.recipe.preprocessor_settings import Preprocessor
from tests.data_examples import a_recipe

PAD, END, START = 0, 1, 2
WORDS = {"[PAD]": PAD, "[END]": END, "[START]": START, "a": 3, "b": 4, "c": 5, "d": 6}
LANGUAGE = "task=text-generation"
IMAGES = "task=image-classification"


def tokenizer(*, starts: bool = False, ends: bool = True) -> PreTrainedTokenizerFast:
    """One id per word of ``WORDS``."""
    core = Tokenizer(models.WordLevel(WORDS, unk_token="d"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if starts:
        core.post_processor = processors.TemplateProcessing(single="[START] $0", special_tokens=[("[START]", START)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[END]" if ends else None)


def grey_images(*sides: int) -> data.Table:
    features = Features({"image": Image(), "label": Value("int64")})
    pictures = [Picture.new("L", (side, side), 10 * index) for index, side in enumerate(sides)]
    return as_table(Dataset.from_dict({"image": pictures, "label": list(range(len(sides)))}, features=features))


def test_a_batch_of_texts_is_padded_to_its_own_longest_and_cut_to_the_length() -> None:
    texts = as_table(Dataset.from_dict({"text": ["a b", "a b c a b c a b c a b c", "c"], "label": [1, 0, 1]}))
    encoded = tasks.encode_examples(texts, a_recipe("train.max_length=8"), tokenizer(starts=True))
    batch = encoded.make_batch([2, 0])
    assert batch["input_ids"].tolist() == [[2, 5, 0], [2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert encoded.make_batch([1])["input_ids"].tolist() == [[2, 3, 4, 5, 3, 4, 5, 3]]
    assert len(encoded) == 3


def test_a_text_for_language_modelling_ends_unless_it_is_cut() -> None:
    texts = as_table(Dataset.from_dict({"text": ["a", "a b c", "a b c d"]}))
    batch = tasks.encode_examples(texts, a_recipe(LANGUAGE, "train.max_length=4"), tokenizer()).make_batch([0, 1, 2])
    assert batch["input_ids"].tolist() == [[3, END, PAD, PAD], [3, 4, 5, END], [3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[3, END, -100, -100], [3, 4, 5, END], [3, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_an_empty_text_still_has_a_token_to_attend_to() -> None:
    batch = tasks.encode_examples(
        as_table(Dataset.from_dict({"text": [""], "label": [0]})), a_recipe(), tokenizer()
    ).make_batch([0])
    assert batch["attention_mask"].tolist() == [[1]]


def test_domains_are_those_of_the_data_or_none() -> None:
    texts = as_table(Dataset.from_dict({"text": ["a", "b"], "label": [0, 1], "domain": ["x", "y"]}))
    assert tasks.encode_examples(texts, a_recipe(), tokenizer()).domains == ["x", "y"]
    assert tasks.encode_examples(texts.select_columns(["text", "label"]), a_recipe(), tokenizer()).domains is None


def test_a_tokenizer_without_end_token_is_refused_for_text_generation() -> None:
    texts = as_table(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ModelError, match="no end token"):
        tasks.encode_examples(texts, a_recipe(LANGUAGE), tokenizer(ends=False))


def test_grey_arrays_are_kept_as_bytes_and_given_out_scaled_in_three_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    features = Features({"image": Array2D((8, 8), "uint8"), "label": Value("int64")})
    images = as_table(Dataset.from_dict({"image": pixels, "label": [4, 5, 6]}, features=features))
    encoded = tasks.encode_examples(images, a_recipe(IMAGES), Preprocessor(side=8))
    batch = encoded.make_batch([2, 0])
    expected = (torch.tensor(pixels[[2, 0]]).float() - 127) / 128
    assert encoded.pixels.dtype == torch.uint8  # type: ignore[attr-defined]
    assert torch.equal(batch["pixel_values"], expected[:, None].expand(2, 3, 8, 8))
    assert batch["labels"].tolist() == [6, 4]


def test_images_are_enlarged_bilinearly_when_given_out() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8), dtype=np.uint8)
    features = Features({"image": Array2D((8, 8), "uint8"), "label": Value("int64")})
    images = as_table(Dataset.from_dict({"image": pixels, "label": [0]}, features=features))
    batch = tasks.encode_examples(images, a_recipe(IMAGES), Preprocessor(side=20)).make_batch([0])
    enlarged = F.interpolate(torch.tensor(pixels[None]).float(), size=(20, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(batch["pixel_values"][:, :1], (enlarged - 127) / 128)


def test_pictures_of_different_sizes_are_brought_to_one() -> None:
    encoded = tasks.encode_examples(grey_images(10, 30, 16), a_recipe(IMAGES), Preprocessor(side=16))
    batch = encoded.make_batch([0, 1, 2])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    expected = (torch.tensor([0.0, 10.0, 20.0]) - 127) / 128
    torch.testing.assert_close(batch["pixel_values"].mean(dim=(1, 2, 3)), expected)


def test_small_pictures_of_one_size_are_kept_small() -> None:
    encoded = tasks.encode_examples(grey_images(8, 8), a_recipe(IMAGES), Preprocessor(side=96))
    assert encoded.pixels.shape == (2, 3, 8, 8)  # type: ignore[attr-defined]


def test_a_picture_that_cannot_be_decoded_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"oops")
    features = Features({"image": Image(), "label": Value("int64")})
    images = as_table(Dataset.from_dict({"image": [str(tmp_path / "broken.png")], "label": [0]}, features=features))
    with pytest.raises(DataError, match=r"broken\.png.*fix or remove the image"):
        tasks.encode_examples(images, a_recipe(IMAGES), Preprocessor())
