"""What reversible blocks keep does not grow with their number."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune.memory import StorageMeter
from fedtune.tasks import Task
from tests.technique_steps import LANGUAGE, TEXT, shared
from tests.tiny import bert, llama, texts

ROWS, LENGTH, WIDTH = 8, 24, 16
STREAM = ROWS * LENGTH * WIDTH * 8


def kept_and_peak(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes kept at the end of the blocks' forward pass, and the peak of the step."""
    model.train()
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        kept = meter.current_bytes
        hidden.backward(torch.ones_like(hidden))
        del hidden
    return kept, meter.peak_bytes


def built(joined: str, blocks: int, task: Task, **settings: Any) -> PreTrainedModel:
    model = bert(num_hidden_layers=blocks) if task == TEXT else llama(num_hidden_layers=blocks)
    shared(joined, model, task, **settings)
    return model


@pytest.mark.parametrize("task", [TEXT, LANGUAGE])
def test_nothing_grows_with_depth_within_a_stretch_of_blocks(task: Task) -> None:
    """A factor of 1/2 lets 24 blocks be one stretch: 12 scalings of one bit."""
    found = []
    for blocks in (6, 12, 24):
        model = built("meft", blocks, task, factor=0.5)
        found.append(kept_and_peak(model, texts(model, ROWS, LENGTH)))
    assert found[0] == found[1] == found[2]


def test_a_cut_adds_two_streams() -> None:
    whole, cut = (built("meft", 24, TEXT, factor=factor) for factor in (0.5, 0.125))
    batch = texts(whole, ROWS, LENGTH)
    kept_whole, kept_cut = kept_and_peak(whole, batch)[0], kept_and_peak(cut, batch)[0]
    assert kept_cut - kept_whole == 2 * STREAM


def test_checkpointing_grows_and_the_peak_is_below_its_own() -> None:
    kept, peaks = {}, {}
    for blocks in (6, 24):
        for joined in ("lora+gradient-checkpointing", "meft"):
            model = built(joined, blocks, LANGUAGE)
            kept[joined, blocks], peaks[joined, blocks] = kept_and_peak(model, texts(model, ROWS, LENGTH))
    assert kept["lora+gradient-checkpointing", 24] > 2.5 * kept["lora+gradient-checkpointing", 6]
    assert kept["meft", 24] - kept["meft", 6] == 2 * STREAM
    assert peaks["meft", 24] < 0.7 * peaks["lora+gradient-checkpointing", 24]


def test_pieces_lower_the_peak() -> None:
    peaks = []
    for pieces in (1, 2, 4):
        model = llama(num_hidden_layers=3, intermediate_size=256)
        shared("meft", model, LANGUAGE, pieces=pieces)
        peaks.append(kept_and_peak(model, texts(model, ROWS, LENGTH))[1])
    assert peaks[0] > 1.1 * peaks[1] > 1.1 * peaks[2]
