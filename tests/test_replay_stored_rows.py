"""Examples as a device stores them: what is restored makes the same batches as what was stored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.continual._stored_rows import has_equal_sizes, pack_examples, unpack_examples
from fedtune.data import EncodedDataset
from fedtune.data.encoded_texts import EncodedTexts, pad_rows
from fedtune.data.pixels import EncodedPictures
from fedtune.data.token_files import StoredTexts, write_token_files
from fedtune.errors import DataError
from fedtune.training import RunContext, clear_run_context, get_run_context
from tests.task_cases import CASES, task_recipe

ROWS = [5, 0, 17, 3]


def load_examples(case: str, folder: Path) -> tuple[EncodedDataset, int]:
    """The encoded training examples of a task, and the padding token of its model."""
    clear_run_context()
    context: RunContext = get_run_context(task_recipe(case, folder, rows=60).model_dump_json())
    clear_run_context()
    padding = getattr(getattr(context.model, "config", None), "pad_token_id", None)
    return context.train, padding or 0


def assert_equal_batches(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_restored_examples_make_the_same_batches(case: str, tmp_path: Path) -> None:
    examples, padding = load_examples(case, tmp_path)
    contents = pack_examples(examples, ROWS)
    restored = unpack_examples(examples, contents, padding)
    assert len(restored) == len(ROWS)
    assert_equal_batches(restored.make_batch([0, 1, 2, 3]), examples.make_batch(ROWS))
    assert_equal_batches(restored.make_batch([2]), examples.make_batch([17]))
    assert pack_examples(restored, [3, 1]) == [contents[3], contents[1]]  # stored again, the same bytes
    assert restored.domains is None


@pytest.mark.parametrize("case", CASES)
def test_the_stored_form_depends_on_the_example_alone(case: str, tmp_path: Path) -> None:
    """Not on its row, nor on the examples around it, which decide how far texts are padded."""
    examples, padding = load_examples(case, tmp_path)
    several = unpack_examples(examples, pack_examples(examples, ROWS), padding)
    alone = unpack_examples(examples, pack_examples(examples, [17]), padding)
    assert pack_examples(several, [2]) == pack_examples(alone, [0]) == pack_examples(examples, [17])
    assert len(set(pack_examples(examples, ROWS))) > 1


def make_pictures(labels: torch.Tensor, side: int = 4) -> EncodedPictures:
    from fedtune.recipe.preprocessor_settings import Preprocessor

    pixels = torch.randint(256, (len(labels), 1, side, side), dtype=torch.uint8)
    preprocessor = Preprocessor(side=side, mean=(0.5,) * 3, std=(0.5,) * 3)
    return EncodedPictures(pixels, preprocessor, labels, None)


def test_pictures_take_equally_many_bytes_whatever_their_label() -> None:
    pictures = make_pictures(torch.tensor([0, 255, 256, 70_000]))
    contents = pack_examples(pictures, range(4))
    assert has_equal_sizes(pictures)
    assert len({len(content) for content in contents}) == 1
    assert len(contents[0]) < 16 + 32  # 16 pixels, the size, the label and the types
    assert unpack_examples(pictures, contents, 0).make_batch([3])["labels"].tolist() == [70_000]


def test_an_example_with_another_label_is_another_example() -> None:
    one = make_pictures(torch.tensor([3]))
    assert pack_examples(one, [0]) != pack_examples(replace(one, labels=torch.tensor([4])), [0])


def test_tokens_take_two_bytes_each_unless_they_are_large() -> None:
    rows = [[1] * 100, [60_000] * 100, [70_000] * 100]
    texts = EncodedTexts(pad_rows(rows, 0), torch.tensor([100] * 3), None, None)
    assert [len(content) for content in pack_examples(texts, range(3))] == [105, 205, 405]
    assert not has_equal_sizes(texts)


def test_texts_in_files_are_stored_as_texts_in_memory(tmp_path: Path) -> None:
    texts = EncodedTexts(pad_rows([[5, 6], [7], [8, 9, 10]], 0), torch.tensor([2, 1, 3]), None, None)
    write_token_files(tmp_path / "tokens", [texts], vocabulary=100, padding=0)
    files = StoredTexts(tmp_path / "tokens")
    restored = unpack_examples(files, pack_examples(files, [2, 0]), 0)
    assert_equal_batches(restored.make_batch([0, 1]), files.make_batch([2, 0]))


def test_rows_without_segments_or_padding_keep_the_padding_token() -> None:
    """A classifier of decoders finds the end of a text by the padding token, so it must be the model's own."""
    texts = EncodedTexts(pad_rows([[5, 6, 7], [8, 9]], 42), torch.tensor([3, 2]), torch.tensor([0, 1]), None)
    batch = unpack_examples(texts, pack_examples(texts, [0, 1]), 42).make_batch([0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 42]]


def test_a_kind_without_a_stored_form_is_refused() -> None:
    class Graphs:
        domains = lengths = None

        def __len__(self) -> int:
            return 1

        def make_batch(self, indices: Any) -> dict[str, torch.Tensor]:
            return {}

    with pytest.raises(DataError, match="kind Graphs cannot be stored on a device; leave out"):
        pack_examples(Graphs(), [0])


def test_stored_examples_of_another_form_are_refused() -> None:
    small, large = make_pictures(torch.tensor([1])), make_pictures(torch.tensor([1]), side=8)
    mixed = [*pack_examples(small, [0]), *pack_examples(large, [0])]
    with pytest.raises(DataError, match="another form than the device's data; start this run's memory anew"):
        unpack_examples(small, mixed, 0)
    texts = EncodedTexts(pad_rows([[5, 6]], 0), torch.tensor([2]), None, None)
    with pytest.raises(DataError, match="another form"):
        unpack_examples(small, pack_examples(texts, [0]), 0)
    for broken in (b"\x09\x01\x00\x00\x00\x01", b"\x00\xff\xff\xff\x7f\x01"):
        with pytest.raises(DataError, match="another form"):
            unpack_examples(texts, [broken], 0)


def test_numbers_are_restored_exactly() -> None:
    similarity = torch.tensor([0.1, 0.2, np.pi], dtype=torch.float32)
    texts = EncodedTexts(pad_rows([[1], [2], [3]], 0), torch.tensor([1] * 3), similarity, None)
    assert torch.equal(
        unpack_examples(texts, pack_examples(texts, [2, 0]), 0).make_batch([0, 1])["labels"], similarity[[2, 0]]
    )
