"""Codecs for the inputs that layers keep, against slow twins, and the rules of saved-tensor hooks."""

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.memory import StorageMeter
from fedtune.techniques._codecs.bit_codes import pack_codes, unpack_codes
from fedtune.techniques._codecs.frequency_split import FrequencySplit
from fedtune.techniques._codecs.int8_rows import Int8Rows
from fedtune.techniques._codecs.saved_inputs import InputCodec, attach_codec, detach_codecs, has_codec
from fedtune.techniques._codecs.saved_tensors import SharedPackings

INT8 = Int8Rows(0)


def division(bits: int = 2, block: int = 8) -> FrequencySplit:
    return FrequencySplit(0, block, bits, tokens=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(codec: InputCodec, x: Tensor) -> Tensor:
    assert codec.accepts(x)
    return codec.unpack(codec.pack(x))


def round_to_eight_bits(row: list[float]) -> list[float]:
    """The readable twin of one row."""
    largest = max(abs(value) for value in row)
    return [0.0 if largest == 0 else round(127 * value / largest) * largest / 127 for value in row]


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5), (1, 1, 9), (5, 1), (4, 1, 1)])
def test_int8_is_the_twin_of_a_row(shape: tuple[int, ...]) -> None:
    x = drawn(*shape)
    x.view(-1, shape[-1])[0] = 0
    found = restored(INT8, x).view(-1, shape[-1]).tolist()
    for row, wanted in zip(found, map(round_to_eight_bits, x.view(-1, shape[-1]).tolist()), strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)


def test_int8_has_a_scale_for_each_channel_of_an_image_and_keeps_its_layout() -> None:
    x = drawn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    x[0, 1] *= 1000
    found = restored(INT8, x)
    assert found.stride() == x.stride()
    assert (found - x).abs().amax((2, 3)).le(x.abs().amax((2, 3)) / 254 * 1.001).all()


def mean_of_blocks(x: Tensor, block: int) -> Tensor:
    """The readable twin of the low part of [h, w]."""
    high, wide = min(block, x.shape[0]), min(block, x.shape[1])
    out = torch.empty_like(x)
    for top in range(0, x.shape[0], high):
        for left in range(0, x.shape[1], wide):
            part = x[top : top + high, left : left + wide]
            out[top : top + high, left : left + wide] = part.mean().bfloat16().float()
    return out


@pytest.mark.parametrize("size", [(16, 16), (7, 9), (8, 8), (3, 17), (1, 6), (23, 1)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_division_is_off_by_less_than_a_step_around_the_means_of_blocks(size: tuple[int, int], bits: int) -> None:
    x = drawn(2, 3, *size)
    found = restored(division(bits), x)
    for picture, other in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        rest = picture - mean_of_blocks(picture, 8)
        step = float(rest.max() - rest.min()) / (2**bits - 1)
        assert float((picture - other).abs().max()) <= 1.03 * step + 1e-6 + 0.02 * float(rest.abs().max())


def test_division_of_a_constant_map_is_exact_up_to_bfloat16() -> None:
    x = torch.full((2, 3, 9, 9), 1.2345)
    torch.testing.assert_close(restored(division(), x), x.bfloat16().float(), rtol=2e-2, atol=1e-6)
    assert torch.equal(restored(division(), torch.zeros(2, 3, 9, 9)), torch.zeros(2, 3, 9, 9))


def test_the_expectation_of_division_is_the_input() -> None:
    torch.manual_seed(0)
    x = drawn(1, 2, 12, 10)
    draws = torch.stack([restored(division(), x) for _ in range(400)])
    spread = draws.std(0).mean() / math.sqrt(400)
    assert float((draws.mean(0) - x).abs().mean()) < 1.5 * float(spread) + 1e-3
    assert float((draws[0] - x).abs().mean()) > 5 * float(spread)  # a single draw is far off


def test_division_of_tokens_averages_over_eight_tokens_of_a_feature() -> None:
    x = drawn(2, 19, 5)
    torch.manual_seed(1)
    found = restored(division(), x)
    torch.manual_seed(1)
    wanted = restored(division(), x.transpose(1, 2)[..., None].contiguous())
    assert torch.equal(found, wanted[..., 0].transpose(1, 2))
    assert found.is_contiguous()


def test_division_takes_the_bits_that_the_card_names() -> None:
    packed = division().pack(drawn(4, 6, 32, 32))
    kept = sum(one.numel() * one.element_size() for one in packed if isinstance(one, Tensor))
    assert kept * 8 / (4 * 6 * 32 * 32) == pytest.approx(16 / 64 + 2 + 32 / 1024)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 13])
def test_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack_codes(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("codec", [INT8, division()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_come_back_in_their_own(codec: InputCodec, dtype: torch.dtype) -> None:
    x = drawn(2, 16, 4).to(dtype)
    found = restored(codec, x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert F.cosine_similarity(found.flatten().double(), x.flatten().double(), 0) > 0.9


@pytest.mark.parametrize("codec", [INT8, division()])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_not_finite_where_it_was(codec: InputCodec, bad: float) -> None:
    x = drawn(2, 16, 4)
    x[1, 3, 2] = bad
    found = restored(codec, x)
    assert not found[1, 3, 2].isfinite()
    assert found[0].isfinite().all()


@pytest.mark.parametrize("codec", [INT8, division()])
@pytest.mark.parametrize("size", [1e-38, 5e37, 3e-42])
def test_very_small_and_very_large_numbers_stay_finite(codec: InputCodec, size: float) -> None:
    x = drawn(2, 16, 4) * size
    found = restored(codec, x)
    assert found.isfinite().all()
    assert float((found - x).abs().max()) <= 2.1 * float(x.abs().max())


# The rules of saved tensors.


class Squared(nn.Module):
    """Saves its input several times, as it is and in other shapes, and an integer index."""

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[-1])
        return (x * x).view(-1)[: x.numel()].sum() + x.view(-1)[: x.shape[-1]].gather(0, index).pow(3).sum()


def with_codec(layer: nn.Module, codec: InputCodec = INT8, shared: SharedPackings | None = None) -> nn.Module:
    attach_codec(layer, codec, shared or SharedPackings())
    return layer.train()


def kept_bytes(run: Any, x: Tensor, layers: nn.Module) -> tuple[Tensor, int]:
    with StorageMeter(excluded=[*layers.parameters(), x]) as meter:
        inner = x * 1.0
        out = run(inner)
        del inner
        return out, meter.current_bytes


def test_layers_with_one_input_keep_one_packed_form_and_let_go_of_the_input() -> None:
    layers, shared = nn.ModuleList(nn.Linear(64, 1) for _ in range(3)), SharedPackings()
    for layer in layers:
        with_codec(layer, INT8, shared)
    x = drawn(8, 10, 64).requires_grad_()
    out, kept = kept_bytes(lambda inner: sum(layer(inner).sum() for layer in layers), x, layers)
    assert kept <= 8 * 10 * (64 + 4) + 100
    out.backward()
    assert not shared._known  # nothing is held once backward has run


def test_a_changed_input_is_packed_anew_and_each_gradient_sees_its_own_state() -> None:
    layer, shared = nn.Linear(64, 3, bias=False), SharedPackings()
    with_codec(layer, INT8, shared)
    x = drawn(8, 64)
    first = layer(x)
    with torch.no_grad():
        x.mul_(3)
    second = layer(x)
    (first.sum() + second.sum()).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, (4 * x / 3).sum(0).expand(3, -1), rtol=0.05, atol=0.2)


def test_a_tensor_kept_as_it_is_must_not_be_changed() -> None:
    layer = nn.Linear(64, 3)
    with_codec(layer)
    x = drawn(8, 64).requires_grad_()
    loss = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)  # its gradient for x needs the weight
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_backward_runs_once() -> None:
    layer = with_codec(nn.Linear(64, 3))
    loss = layer(drawn(8, 64)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_the_input_is_packed_in_every_shape_it_is_saved_in() -> None:
    x = (drawn(4, 6, 32) * 10).requires_grad_()
    with_codec(layer := Squared())
    layer(x).backward()
    rounded = restored(INT8, x.detach())
    wanted = 2 * rounded
    wanted.view(-1)[:32] += 3 * x.detach().view(-1)[:32] ** 2  # a part of the input stays exact
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 64),
        torch.zeros(4, 0, 64),
        drawn(64),
        drawn(64, 8).t(),
        drawn(1, 64).expand(8, 64),
        drawn(8, 128)[:, ::2],
        drawn(9, 64)[1:],
    ],
    ids=["no rows", "no tokens", "one row", "transposed", "expanded", "strided", "offset"],
)
@pytest.mark.parametrize("codec", [INT8, division()])
def test_odd_inputs_have_gradients_close_to_those_without_a_codec(codec: InputCodec, x: Tensor) -> None:
    layer = nn.Linear(64, 3)
    layer(x).sum().backward()
    wanted = layer.weight.grad
    layer.weight.grad = None
    with_codec(layer, codec)(x).sum().backward()
    assert wanted is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=0.05, atol=0.3)


def test_a_storage_at_the_address_of_one_that_is_gone_is_packed_anew() -> None:
    shared, made = SharedPackings(), []
    for number in range(20):
        x = torch.full((64,), float(number))
        made.append(shared.pack(x.untyped_storage(), "key", x.clone))
        del x
    assert [float(one.content[0]) for one in made] == list(range(20))


def test_scoring_and_pickling_leave_a_layer_as_it_is() -> None:
    layer = nn.Linear(64, 3)
    with_codec(layer)
    copy = pickle.loads(pickle.dumps(layer))
    x = drawn(8, 64)
    assert has_codec(copy)
    assert torch.equal(copy(x), layer(x))
    assert torch.equal(layer.eval()(x), F.linear(x, layer.weight, layer.bias))
    detach_codecs(layer)
    assert not has_codec(layer)
