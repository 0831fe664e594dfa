import json
import math
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.client_update import ClientUpdate, TensorSpec, decode_tensors, pack
from fedtune.wire.update_checks import NormLimit, check_client_update

KEY = "federation.max_update_norm"
EXPECTED = {"a": (2, 3), "b": ()}


def deltas(**changed: Tensor) -> dict[str, Tensor]:
    return {"a": torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), "b": torch.tensor(12.0)} | changed


def with_precision(dtype: str, nbytes: int) -> bytes:
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(nbytes)


def spooled(folder: Path, payload: bytes) -> Path:
    path = folder / "client.safetensors"
    path.write_bytes(payload)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_pattern_travels_bit_for_bit(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    back = decode_tensors(pack({"every": every}))["every"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.int16), every.view(torch.int16))


def test_a_strided_tensor_travels_as_it_reads() -> None:
    strided = torch.arange(6.0).reshape(2, 3).t()
    assert torch.equal(decode_tensors(pack({"a": strided}))["a"], strided)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        pickle.dumps({"a": [0.0] * 100}),
        pack(deltas())[:-1],
        pack(deltas()) + b"x",
        struct.pack("<Q", 1 << 60) + b"{}",
    ],
    ids=["empty", "pickle", "cut short", "too long", "huge header"],
)
def test_a_payload_that_is_not_safetensors_is_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(ClientUpdateError, match=r"^the payload is not safetensors \(.*\); update the client$"):
        check_client_update(spooled(tmp_path, payload), {"a": EXPECTED["a"]}, {})


@pytest.mark.parametrize("payload", [with_precision("F4", 1), with_precision("F8_E8M0", 2)])
def test_a_precision_torch_cannot_compute_with_is_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(ClientUpdateError):
        check_client_update(spooled(tmp_path, payload), {"a": EXPECTED["a"]}, {})


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(ClientUpdateError):
        decode_tensors(pickle.dumps(Trap()))
    assert not (tmp_path / "ran").exists()


def test_the_norm_is_over_all_tensors_together(tmp_path: Path) -> None:
    assert check_client_update(spooled(tmp_path, pack(deltas())), EXPECTED, {}) == 13.0


def test_a_norm_at_the_bound_is_accepted_and_one_above_is_refused(tmp_path: Path) -> None:
    assert check_client_update(spooled(tmp_path, pack(deltas())), EXPECTED, {}, NormLimit(13.0, KEY)) == 13.0
    with pytest.raises(ClientUpdateError, match=r"^its norm 13 is above federation.max_update_norm 12.99"):
        check_client_update(spooled(tmp_path, pack(deltas())), EXPECTED, {}, NormLimit(math.nextafter(12.99, 0), KEY))


def test_the_norm_of_large_values_does_not_overflow(tmp_path: Path) -> None:
    large = torch.full((), 3e38)
    assert check_client_update(spooled(tmp_path, pack({"b": large})), {"b": ()}, {}) == pytest.approx(3e38)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        ({"a": deltas()["a"]}, r"tensor names differ: missing \['b'\], unknown \[\]"),
        (deltas(c=torch.zeros(1)), r"tensor names differ: missing \[\], unknown \['c'\]"),
        ({}, r"missing \['a', 'b'\]"),
        (deltas(a=torch.zeros(3, 2)), r"a has shape \[3, 2\] instead of \[2, 3\]"),
        (deltas(a=torch.zeros(6)), r"a has shape \[6\] instead of \[2, 3\]"),
        (deltas(b=torch.zeros(1)), r"b has shape \[1\] instead of \[\]"),
        (deltas(b=torch.tensor(0.0, dtype=torch.float64)), "b is F64 instead of F32"),
        (deltas(b=torch.tensor(0.0, dtype=torch.bfloat16)), "b is BF16 instead of F32"),
        (deltas(b=torch.tensor(0)), "b is I64 instead of F32"),
        (deltas(b=torch.tensor(math.nan)), "b holds values that are not finite"),
        (deltas(b=torch.tensor(math.inf)), "b holds values that are not finite"),
        (deltas(a=torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]])), "a holds values that are not finite"),
    ],
)
def test_what_does_not_hold_is_refused_by_name(tmp_path: Path, sent: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(ClientUpdateError, match=sentence):
        check_client_update(spooled(tmp_path, pack(sent)), EXPECTED, {})


@pytest.mark.parametrize("value", [-1.0, -1e-30])
def test_counts_and_sums_that_are_negative_are_refused(tmp_path: Path, value: float) -> None:
    path = spooled(tmp_path, pack({"counts": torch.tensor([3.0, value])}))
    assert check_client_update(path, {}, {"counts": TensorSpec((2,))}) == 0
    with pytest.raises(ClientUpdateError, match=r"^counts holds negative numbers$"):
        check_client_update(path, {}, {"counts": TensorSpec((2,), negative=False)})


def test_a_client_that_sends_a_hundred_unknown_names_gets_a_short_answer(tmp_path: Path) -> None:
    flood = deltas(**{f"n{number:03}": torch.zeros(1) for number in range(100)})
    with pytest.raises(ClientUpdateError, match=r"unknown \['n000', 'n001', 'n002'\]$"):
        check_client_update(spooled(tmp_path, pack(flood)), EXPECTED, {})


@pytest.mark.parametrize("shape", [(), (5,), (5, 2), (5, 2, 3), (0, 4)])
def test_rows_put_together_are_the_delta(tmp_path: Path, shape: tuple[int, ...]) -> None:
    delta = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    (tmp_path / "a").write_bytes(pack({"other": torch.zeros(3), "a": delta}))
    sent = ClientUpdate(client=0, num_examples=1, path=tmp_path / "a")
    height = shape[0] if shape else 1
    pieces = [sent.read_rows("a", start, min(start + 2, height)) for start in range(0, height, 2)]
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces] or [torch.zeros(0)]), delta.flatten())
    assert all(piece.shape[1:] == shape[1:] for piece in pieces)
