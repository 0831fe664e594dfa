import errno
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedtune.checkpoint import hash_tensors, read_checkpoint, write_checkpoint
from fedtune.errors import StoreError


def a_state() -> dict[str, Tensor]:
    numbers = torch.arange(12, dtype=torch.float32)
    return {"b.weight": numbers.reshape(3, 4), "a.bias": -numbers[:3], "scale": torch.tensor(2.5)}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = a_state() | {"nan": torch.tensor([float("nan"), -0.0]), "none": torch.zeros(0, 3)}
    written = write_checkpoint(tmp_path / "run" / "1.safetensors", state)
    back = read_checkpoint(tmp_path / "run" / "1.safetensors", written)
    assert back.keys() == state.keys()
    assert hash_tensors(back) == hash_tensors(state) == written
    assert torch.equal(back["b.weight"], state["b.weight"])


def test_a_transposed_tensor_is_saved_as_it_reads(tmp_path: Path) -> None:
    state = {"a": torch.arange(12.0).reshape(3, 4).t()}
    written = write_checkpoint(tmp_path / "a", state)
    assert torch.equal(read_checkpoint(tmp_path / "a", written)["a"], state["a"])


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).nextafter(torch.tensor(9.0))},
        {"a": torch.tensor([2.0, 1.0])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(0)},
        {},
    ],
    ids=["name", "precision", "kind", "shape", "last bit", "order of values", "one more", "none"],
)
def test_the_digest_depends_on_names_precisions_shapes_and_bytes(other: dict[str, Tensor]) -> None:
    assert hash_tensors({"a": torch.tensor([1.0, 2.0])}) != hash_tensors(other)


def test_the_digest_tells_zero_from_minus_zero() -> None:
    assert hash_tensors({"a": torch.tensor(0.0)}) != hash_tensors({"a": torch.tensor(-0.0)})


def test_the_digest_does_not_depend_on_order_or_strides() -> None:
    state = a_state()
    assert hash_tensors(dict(reversed(state.items()))) == hash_tensors(state)
    strided = state | {"b.weight": state["b.weight"].t().contiguous().t()}
    assert not strided["b.weight"].is_contiguous()
    assert hash_tensors(strided) == hash_tensors(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_every_precision_has_a_digest(dtype: torch.dtype) -> None:
    assert hash_tensors({"a": torch.ones(2).to(dtype)}) != hash_tensors({"a": torch.zeros(2).to(dtype)})


def test_a_checkpoint_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"^the checkpoint {tmp_path}/a is missing; resume from another run or start"):
        read_checkpoint(tmp_path / "a")


def unknown_precision() -> bytes:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(3)


@pytest.mark.parametrize(
    "content",
    [b"", pickle.dumps({"a": [1.0] * 50}), safetensors.torch.save(a_state())[:-1], unknown_precision()],
    ids=["empty", "pickle", "cut short", "unknown precision"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(StoreError, match=r"a is not a safetensors checkpoint .*; name one that fedtune wrote"):
        read_checkpoint(tmp_path / "a")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a safetensors checkpoint"):
        read_checkpoint(tmp_path)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "a", a_state())
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert read_checkpoint(tmp_path / "a").keys() == a_state().keys()
    with pytest.raises(StoreError, match=r"a has changed since it was written \(its SHA-256 differs\)"):
        read_checkpoint(tmp_path / "a", written)


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_checkpoint(tmp_path / "a", a_state())

    def half(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(StoreError, match="No space left on device"):
        write_checkpoint(tmp_path / "a", {"a": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert hash_tensors(read_checkpoint(tmp_path / "a", before)) == before
