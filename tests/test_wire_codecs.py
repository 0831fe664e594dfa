"""Codecs of messages against twins in NumPy and closed forms, their exact sizes, and content that nobody wrote."""

import math
import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.library.method_list import describe_method
from fedtune.library.plug_in_check import check_plug_in
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import list_unit_names
from fedtune.wire.codecs import WirePipeline, build_wire_pipeline, count_coded_bytes, decode_values, encode_values
from fedtune.wire.codecs._sorted_positions import count_position_bytes, pack_positions, unpack_positions
from fedtune.wire.codecs.random_k import draw_positions

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Array = NDArray[np.float32]
NAMES = list_unit_names("fedtune.wire.codecs")
SHAPES = ((40, 30), (1000,), (7,), (), (3, 4, 5, 2), (0, 4))


def pipeline(*names: str, **settings: Any) -> WirePipeline:
    """The codecs of these names; the settings are those of the first."""
    units = [Unit(name=name, settings=settings if not place else {}) for place, name in enumerate(names)]
    return build_wire_pipeline(units, "wire.up")


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Values that differ by orders of magnitude, some of them zero."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * 10.0 ** random.integers(-6, 1, shape) * (random.random(shape) > 0.1)
    return torch.from_numpy(np.asarray(values, np.float32))


def transmit(tensor: Tensor, *names: str, seed: int = 5, **settings: Any) -> Tensor:
    """What arrives of a tensor. The bytes are as many as the layout tells."""
    codecs = pipeline(*names, **settings).codecs
    content = encode_values(codecs, tensor, seed)
    assert len(content) == count_coded_bytes(codecs, tuple(tensor.shape))
    found = decode_values(codecs, content, tuple(tensor.shape), seed)
    assert found.shape == tensor.shape
    return found


def cut(values: Array, block: int) -> list[Array]:
    return [values[start : start + block] for start in range(0, len(values), block)]


def round_to_bfloat16(values: Array) -> Array:
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def round_to_levels(values: Array, block: int, most: int) -> Array:
    """Each block as whole numbers from -most to most times its scale, a plain loop."""
    found = []
    for one in cut(values, block):
        scale = np.float32(np.abs(one).max() / np.float32(most))
        found += [np.rint(one / scale) * scale if scale else one * 0]
    return np.concatenate([*found, np.zeros(0)]).astype(np.float32)


def test_every_codec_is_driven() -> None:
    assert NAMES == ["bf16", "int4", "int8", "low-rank", "random-k", "sign", "top-k", "zstd"]


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_passes_the_checks_of_a_plug_in_and_has_a_card(name: str) -> None:
    results = list(check_plug_in(name))
    assert {(one.what, one.reason) for one in results if one.status != "ok"} == set()
    card = describe_method("codec", name).card
    assert all(part in card for part in ("What:", "Sends:", "Defaults:", "Use when:", "Avoid when:", "Source:"))


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_rounds_as_the_twin(shape: tuple[int, ...]) -> None:
    tensor = draw(shape)
    expected = round_to_bfloat16(tensor.numpy().ravel())
    np.testing.assert_array_equal(transmit(tensor, "bf16").numpy().ravel(), expected)
    assert bool(((transmit(tensor, "bf16") - tensor).abs() <= 2.0**-8 * tensor.abs()).all())


@pytest.mark.parametrize(
    ("name", "most", "block"), [("int8", 127, 256), ("int8", 127, 9), ("int4", 7, 64), ("int4", 7, 8)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_numbers_are_those_of_the_twin(name: str, most: int, block: int, shape: tuple[int, ...]) -> None:
    tensor = draw(shape)
    found, flat = transmit(tensor, name, block=block).numpy().ravel(), tensor.numpy().ravel()
    np.testing.assert_array_equal(found, round_to_levels(flat, block, most))
    for received, sent in zip(cut(found, block), cut(flat, block), strict=True):
        assert np.abs(received - sent).max() <= np.abs(sent).max() / (2 * most) * (1 + 1e-5)
        assert np.all(np.abs(received - sent) <= np.abs(sent) * (1 + 1e-6)), "no value moves by more than itself"


def test_sizes_of_whole_numbers_and_signs_in_closed_form() -> None:
    shape = (25, 41)
    sizes = {name: count_coded_bytes(pipeline(name).codecs, shape) for name in ("bf16", "int8", "int4", "sign")}
    assert sizes == {"bf16": 2050, "int8": 1025 + 4 * 5, "int4": 513 + 4 * 17, "sign": 129 + 4 * 2}


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_lose_what_the_closed_form_tells(shape: tuple[int, ...]) -> None:
    """With the mean magnitude m of n values as scale, the squared error is sum x^2 - n m^2."""
    tensor, block = draw(shape), 16
    found = transmit(tensor, "sign", block=block)
    lost = float(((found - tensor).double() ** 2).sum())
    flat = tensor.double().numpy().ravel()
    expected = sum(float((one**2).sum() - np.abs(one).sum() ** 2 / len(one)) for one in cut(flat, block))
    assert lost == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_keeps_the_largest_and_nothing_else(shape: tuple[int, ...], k: int) -> None:
    flat = (tensor := draw(shape)).numpy().ravel()
    largest = np.argsort(-np.abs(flat), kind="stable")[:k]
    expected = np.zeros_like(flat)
    expected[largest] = flat[largest]
    np.testing.assert_array_equal(transmit(tensor, "top-k", k=k).numpy().ravel(), expected)


def test_of_equal_magnitudes_the_first_are_sent() -> None:
    tensor = torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0])
    assert transmit(tensor, "top-k", k=2).tolist() == [0, -2, 2, 0, 0]


def test_random_k_draws_the_positions_of_splitmix64_in_plain_integers() -> None:
    def mix(state: int) -> int:
        mask = (1 << 64) - 1
        one = state & mask
        one = ((one ^ (one >> 30)) * 0xBF58476D1CE4E5B9) & mask
        one = ((one ^ (one >> 27)) * 0x94D049BB133111EB) & mask
        return one ^ (one >> 31)

    seed, size = (1 << 63) - 5, 50
    numbers = [mix(seed + 0x9E3779B97F4A7C15 * (place + 1)) for place in range(size)]
    expected = sorted(sorted(range(size), key=numbers.__getitem__)[:9])
    assert draw_positions(seed, 9, size).tolist() == expected
    tensor = draw((5, 10))
    found = transmit(tensor, "random-k", seed=seed, k=9).flatten()
    assert found[expected].tolist() == tensor.flatten()[expected].tolist()
    assert int((found != 0).sum()) <= 9


def test_unbiased_random_k_has_the_tensor_as_its_mean() -> None:
    tensor = torch.linspace(-1, 1, 12)
    draws = torch.stack([transmit(tensor, "random-k", seed=seed, k=4, unbiased=True) for seed in range(500)])
    deviation = math.sqrt((12 / 4 - 1) / 500)  # of the mean of x * 3 with probability 1/3
    assert bool(((draws.mean(0) - tensor).abs() <= 4 * deviation * tensor.abs()).all())


def test_low_rank_is_exact_for_its_rank_and_near_the_best_otherwise() -> None:
    random = torch.Generator().manual_seed(3)
    thin = torch.randn(40, 3, generator=random) @ torch.randn(3, 30, generator=random)
    torch.testing.assert_close(transmit(thin, "low-rank", rank=3), thin, rtol=1e-4, atol=1e-4)
    decaying = torch.linalg.qr(torch.randn(40, 30, generator=random)).Q * 0.7 ** torch.arange(30.0)
    decaying = decaying @ torch.linalg.qr(torch.randn(30, 30, generator=random)).Q
    best = math.sqrt(sum(0.7 ** (2 * place) for place in range(4, 30)))
    lost = float((transmit(decaying, "low-rank", rank=4, iterations=4) - decaying).norm())
    assert best * (1 - 1e-5) <= lost <= best * 1.02


def test_low_rank_leaves_vectors_and_small_matrices_to_the_next_codec() -> None:
    codecs = pipeline("low-rank", "int8", rank=4).codecs
    assert count_coded_bytes(codecs, (100,)) == 104
    assert count_coded_bytes(codecs, (5, 6)) == 34, "4 (5 + 6) values are more than 30"
    assert count_coded_bytes(codecs, (40, 3, 10)) == (160 + 4) + (120 + 4)
    assert torch.equal(transmit(draw((5, 6)), "low-rank", rank=4), draw((5, 6)))


@pytest.mark.parametrize(
    "names",
    [
        ("top-k", "int8"),
        ("top-k", "sign"),
        ("random-k", "int4"),
        ("random-k", "bf16"),
        ("low-rank", "bf16"),
        ("low-rank", "top-k", "int4"),
        ("low-rank", "random-k"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_codecs_in_order_are_one_after_the_other(names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """The first codec alone, whose tensors the rest transmits, gives what all together give."""
    tensor, (first, *rest) = draw(shape), pipeline(*names).codecs
    coded = first.encode(tensor, 5)
    received = [decode_values(rest, encode_values(rest, one, 5), tuple(one.shape), 5) for one in coded.tensors]
    assert torch.equal(transmit(tensor, *names), first.decode(coded.content, received, shape, 5))


@pytest.mark.parametrize("name", [one for one in NAMES if one != "zstd"])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-37, -1.0])
def test_constant_tensors_lose_no_more_than_they_are(name: str, value: float) -> None:
    """A block of zeros has the scale zero, and one of subnormal values a scale that vanishes."""
    tensor = torch.full((40, 30), value)
    lost = (transmit(tensor, name) - tensor).double().norm()
    assert float(lost) <= float(tensor.double().norm()) * (1 + 1e-6)


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 1), (5, 5), (1, 1000), (37, 1000), (500, 1000), (64, 64000)])
def test_positions_come_back_and_take_about_the_least_bits(count: int, size: int) -> None:
    chosen = np.sort(np.random.default_rng(1).choice(size, count, replace=False)) if size else np.zeros(0, np.int64)
    content = pack_positions(chosen, size)
    assert len(content) == count_position_bytes(count, size)
    assert unpack_positions(content, count, size).tolist() == chosen.tolist()
    assert not count or 8 * len(content) <= count * (2 + math.log2(size / count)) + 17
    if count:
        last = np.arange(size - count, size)
        assert unpack_positions(pack_positions(last, size), count, size).tolist() == last.tolist()


def test_positions_that_repeat_or_lie_outside_or_are_too_many_are_refused() -> None:
    """Eight positions of 100 have three low bits each, which may be set so that two are equal, or one is above 99."""
    chosen = np.array([3, 8, 20, 40, 41, 60, 80, 99])
    good = bytearray(pack_positions(chosen, 100))
    assert len(good) == 3 + 3
    for changed, reason in (
        (swap(good, 41, 40), "repeat"),
        (swap(good, 99, 103), "not below 100"),
        (swap(good, 41, 40, 40, 41), "not sorted"),
        (good[:3] + bytes(3), "0 positions instead of 8"),
        (good[:3] + b"\xff" * 3, "positions instead of 8"),
    ):
        with pytest.raises(ClientUpdateError, match=reason):
            unpack_positions(bytes(changed), 8, 100)


def swap(content: bytearray, *values: int) -> bytearray:
    """Set the low bits of a position to those of another one: pairs of (which, value)."""
    places = {3: 0, 8: 1, 20: 2, 40: 3, 41: 4, 60: 5, 80: 6, 99: 7}
    bits = np.unpackbits(np.frombuffer(bytes(content[:3]), np.uint8))
    for which, value in zip(values[::2], values[1::2], strict=True):
        bits[3 * places[which] : 3 * places[which] + 3] = [(value >> bit) & 1 for bit in range(3)]
    return bytearray(np.packbits(bits).tobytes()) + content[3:]


@pytest.mark.parametrize(("name", "code"), [("int8", -128), ("int4", 0)])
def test_a_code_below_the_range_is_refused(name: str, code: int) -> None:
    content = struct.pack("<f", 1.0) + struct.pack("b", code) * (8 if name == "int8" else 4)
    with pytest.raises(ClientUpdateError, match="below its block's range"):
        decode_values(pipeline(name).codecs, content, (8,), 0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
@pytest.mark.parametrize("names", [("int8",), ("int4",), ("sign",), ("top-k", "int8"), ("low-rank", "int8")])
def test_a_scale_that_is_no_number_leaves_no_finite_tensor(names: tuple[str, ...], scale: float) -> None:
    """So the checks of values refuse it as they refuse it in single precision. The device's own values do the same."""
    tensor, codecs = torch.ones(30, 40), pipeline(*names).codecs
    content = bytearray(encode_values(codecs, tensor, 0))
    start = codecs[0].get_layout((30, 40)).num_bytes if len(names) == 2 else 0
    content[start : start + 4] = struct.pack("<f", scale)
    assert not bool(decode_values(codecs, bytes(content), (30, 40), 0).isfinite().all())
    tensor[3, 5] = scale
    assert not bool(transmit(tensor, *names).isfinite().all())


@pytest.mark.parametrize("names", [("int8",), ("top-k",), ("low-rank", "bf16")])
@pytest.mark.parametrize("change", [-1, 1])
def test_content_of_another_size_is_refused(names: tuple[str, ...], change: int) -> None:
    codecs = pipeline(*names).codecs
    content = encode_values(codecs, draw((20, 30)), 0) + b"\0"
    with pytest.raises(ClientUpdateError, match="bytes instead of"):
        decode_values(codecs, content[: len(content) - 1 + change], (20, 30), 0)


def test_zstd_takes_only_the_size_that_both_ends_know() -> None:
    coder = pipeline("zstd").coder
    assert coder is not None
    content = np.random.default_rng(0).bytes(3000) + bytes(3000)
    coded = coder.compress(content)
    assert coder.decompress(coded, 6000) == content
    bomb = zstd.compress(bytes(1 << 28), 1)
    assert len(bomb) < 20_000
    hostile = {
        "longer": coder.compress(content + b"\0"),
        "shorter": coder.compress(content[:-1]),
        "bomb": bomb,
        "truncated": coded[:-1],
        "cut in half": coded[: len(coded) // 2],
        "followed": coded + b"\0",
        "twice": coded + coded,
        "behind a skippable frame": b"\x50\x2a\x4d\x18\x05\0\0\0hello" + coded,
        "empty": b"",
        "no frame": content,
        "a window of 128 MB": write_frame_with_window(content, 27),
    }
    for name, one in hostile.items():
        with pytest.raises(ClientUpdateError, match=r"does not expand to|cannot be decompressed"):
            assert coder.decompress(one, 6000) is None, name


def write_frame_with_window(content: bytes, log: int) -> bytes:
    """A frame of one raw block that does not tell its size and asks for a window of 2 ** log bytes (RFC 8878, 3.1)."""
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + b"\0" + bytes([(log - 10) << 3]) + block + content


def test_a_frame_of_the_test_is_valid_but_for_its_window() -> None:
    content = bytes(range(250))
    coder = pipeline("zstd").coder
    assert coder is not None
    assert coder.decompress(write_frame_with_window(content, 10), 250) == content


@pytest.mark.parametrize("size", [0, 1, 100, 5000, 200_000])
def test_the_bound_of_zstd_holds_for_noise(size: int) -> None:
    coder = pipeline("zstd", level=19).coder
    assert coder is not None
    assert len(coder.compress(np.random.default_rng(0).bytes(size))) <= coder.get_most_bytes(size)


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        (["topk"], "there is no 'topk'; did you mean 'top-k'"),
        (["int8", "top-k"], "top-k cannot follow int8, which has made bytes of all values; name top-k before int8"),
        (["int8", "int4"], "int4 cannot follow int8, which has made bytes of all values; keep one of them"),
        (["zstd", "int8"], "int8 cannot follow zstd, which codes the bytes of the whole message; name int8 before"),
        (["top-k", "low-rank"], "low-rank cannot follow top-k, which leaves a list of values and no matrix"),
        (["top-k", "random-k"], "keep one of them"),
        (["zstd", "zstd"], "keep one of them"),
        ([{"top-k": {"k": 0}}], "k"),
        ([{"random-k": {"k": 0}}], "k"),
        ([{"top-k": {"share": 0}}], "share"),
        ([{"top-k": {"share": 1.5}}], "share"),
        ([{"int8": {"block": 0}}], "block"),
        ([{"low-rank": {"rank": 0}}], "rank"),
        ([{"zstd": {"level": 50}}], "level"),
    ],
)
def test_codecs_that_cannot_follow_each_other_are_refused(units: list[Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        build_wire_pipeline([Unit.model_validate(one) for one in units], "wire.up")
