"""What is kept for the backward pass, to the byte, by the formula; and that nothing else stays alive."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedtune import models
from fedtune.memory import StorageMeter
from fedtune.recipe.schema import ModelSettings
from fedtune.techniques._layers.frozen_batch_norm import FrozenBatchNorm2d
from fedtune.techniques._layers.one_bit_activation import OneBitActivation
from fedtune.training import compute_step_loss, set_train_mode
from tests.mobile_nets import SHAPES, SmallNet, age, pictures
from tests.technique_steps import IMAGES, shared

ROWS = 8


@dataclass(frozen=True)
class Sizes:
    """Elements of a block's maps: what it takes, widened, filtered, and what it gives; and its channels out."""

    taken: int
    widened: int | None
    filtered: int
    given: int
    channels: int

    def masks(self) -> int:
        """Bytes: a bit per element and activation."""
        return sum(-(-elements // 8) for elements in (self.widened, self.filtered) if elements is not None)

    def kept(self, *, live: bool) -> int:
        """Bytes of the inputs of three convolutions and of the last norm, with the batch's mean and deviation."""
        norm = self.given + 2 * self.channels * live
        return 4 * (self.taken + (self.widened or 0) + self.filtered + norm) + self.masks()


def sizes(side: int) -> Iterator[Sizes]:
    """Of each block of SmallNet, for pictures of this side."""
    inputs, side = 8, -(-side // 2)
    for expansion, _, stride, outputs in SHAPES:
        after = -(-side // stride)
        before, behind = ROWS * inputs * side**2, ROWS * inputs * after**2
        widened = None if expansion == 1 else expansion * before
        yield Sizes(before, widened, expansion * behind, ROWS * outputs * after**2, outputs)
        inputs, side = outputs, after


def kept(model: Any, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes kept for a step, and those of packed masks among them."""
    set_train_mode(model)
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel() if tensor.dtype == torch.uint8 else 0)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_step_loss(IMAGES, model, batch)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = compute_step_loss(IMAGES, model, batch)
        found = meter.current_bytes
    loss.backward()
    return found, sum(packed)


def of_the_head(batch: dict[str, Tensor]) -> int:
    """Bytes a classifier on the frozen rest keeps."""
    model = age(SmallNet())
    shared("head-only", model, IMAGES)
    return kept(model, batch)[0]


@pytest.mark.parametrize("side", [32, 37])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_block_keeps_three_inputs_of_convolutions_one_of_a_norm_and_a_bit_per_activation(
    count: int, side: int
) -> None:
    model = age(SmallNet())
    shared("mobiletl", model, IMAGES, blocks=count)
    batch = pictures(ROWS, side)
    tops = list(sizes(side))[-count:]
    tail = ROWS * 24 * tops[-1].given // (ROWS * 16)
    live = sum(block.kept(live=block.given // block.channels >= 32) for block in tops)
    found, packed = kept(model, batch)
    assert found - of_the_head(batch) == live + 4 * tops[-1].given + -(-tail // 8)
    assert packed == sum(block.masks() for block in tops) + -(-tail // 8)


def test_a_frozen_head_keeps_its_mask_alone() -> None:
    model = age(SmallNet())
    shared("mobiletl", model, IMAGES, blocks=2, head="freeze", last_norm="frozen")
    batch = pictures(ROWS)
    tops = list(sizes(32))[-2:]
    tail = ROWS * 24 * tops[-1].given // (ROWS * 16)
    wanted = sum(block.kept(live=False) for block in tops) + -(-tail // 8)
    assert kept(model, batch)[0] - of_the_head(batch) == wanted


def test_nothing_of_the_frozen_part_is_kept_whatever_the_size_of_its_maps() -> None:
    """All that is kept is of the top blocks: the formula has no other term, and five times the rows give five times."""
    model = age(SmallNet())
    shared("mobiletl", model, IMAGES, blocks=1, last_norm="frozen")
    little, much = (kept(model, pictures(rows))[0] for rows in (8, 40))
    assert much < 5 * little + 64


def test_bias_keeps_masks_alone() -> None:
    """A bit per activation of the whole net; the head's share is what it always is."""
    model = age(SmallNet())
    shared("bias", model, IMAGES)
    batch = pictures(ROWS)
    blocks = list(sizes(32))
    stem, tail = ROWS * 8 * 16 * 16, ROWS * 24 * blocks[-1].given // (ROWS * 16)
    wanted = sum(block.masks() for block in blocks) + stem // 8 + -(-tail // 8)
    assert kept(model, batch)[0] - of_the_head(batch) == wanted


def test_norm_keeps_masks_and_the_inputs_of_norms() -> None:
    model = age(SmallNet())
    shared("batch-norm", model, IMAGES)
    batch = pictures(ROWS)
    blocks = list(sizes(32))
    stem, tail = ROWS * 8 * 16 * 16, ROWS * 24 * blocks[-1].given // (ROWS * 16)
    inputs = sum((block.widened or 0) + block.filtered + block.given for block in blocks) + stem + tail
    wanted = 4 * inputs + sum(block.masks() for block in blocks) + stem // 8 + -(-tail // 8)
    assert kept(model, batch)[0] - of_the_head(batch) == wanted


def test_inputs_of_norms_and_activations_die_before_the_backward_pass() -> None:
    model = age(SmallNet())
    shared("mobiletl", model, IMAGES, blocks=3)
    held: list[tuple[str, weakref.ref[Any]]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        held.append((type(module).__name__, weakref.ref(args[0].untyped_storage())))

    for layer in model.modules():
        if isinstance(layer, FrozenBatchNorm2d | OneBitActivation):
            layer.register_forward_pre_hook(note)
    set_train_mode(model)
    loss = compute_step_loss(IMAGES, model, pictures())
    assert len(held) == 2 * (3 * 2 + 1)
    assert [name for name, one in held if one() is not None] == []
    loss.backward()


def test_the_top_three_blocks_of_lite0_keep_what_was_claimed() -> None:
    """At 96 pixels and eight pictures: at most 2.6 MB, where PyTorch keeps 7.3."""
    figures = {}
    for technique in ("mobiletl", "last-blocks"):
        model = models.load_model(ModelSettings(source="sample:efficientnet-lite0"), IMAGES, ("a", "b", "c"), seed=0)
        shared(technique, model, IMAGES)
        figures[technique] = kept(model, pictures(8, 96))[0]
    assert figures["mobiletl"] <= 2_600_000
    assert 7_200_000 < figures["last-blocks"] < 7_400_000
