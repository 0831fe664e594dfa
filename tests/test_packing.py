"""Payloads: what the safetensors library reads from them is what went in, whatever the shapes and precisions."""

import json
import tracemalloc

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedtune.wire.tensor_payload import pack

PRECISIONS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def some(precision: torch.dtype, *shape: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64) * 9
    return numbers > 0 if precision == torch.bool else numbers.abs().to(precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_library_reads_what_was_packed(precision: torch.dtype) -> None:
    sent = {
        "whole": some(precision, 3, 5),
        "none": some(precision, 0, 4),
        "point": some(precision),
        "odd": some(precision, 7),
    }
    got = safetensors.torch.load(pack(sent))
    assert got.keys() == sent.keys()
    for name, tensor in sent.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_precisions_may_be_mixed_and_views_are_written_in_order() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    sent = {"z": base.T, 'a\n"ü': base[::2, 1:], "bits": torch.ones(5, dtype=torch.uint8), "wide": base.double()}
    got = safetensors.torch.load(pack(sent))
    assert all(torch.equal(got[name], tensor) for name, tensor in sent.items())


def test_every_tensor_lies_at_a_multiple_of_its_elements_size() -> None:
    payload = pack({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(3, dtype=torch.float64)})
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert [header[name]["data_offsets"][0] % size for name, size in (("a", 1), ("b", 4), ("c", 8))] == [0, 0, 0]


def test_nothing_at_all_is_a_payload_too() -> None:
    assert safetensors.torch.load(pack({})) == {}


def test_the_payload_is_the_only_copy() -> None:
    sent = {f"t{number}": torch.ones(250_000) for number in range(8)}  # 8 MB
    tracemalloc.start()
    payload = pack(sent)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(payload) > 8_000_000
    assert peak < 1.05 * len(payload)


def test_a_precision_without_a_code_is_refused() -> None:
    with pytest.raises(KeyError):
        pack({"complex": torch.ones(2, dtype=torch.complex64)})
