"""Stores of paged weights: what is written is what is read, and a store that is not what was written is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from torch import Tensor

from fedtune.errors import SourceError
from fedtune.models.paging import paged_matrix, store
from fedtune.models.paging.byte_readers import FileBytes
from fedtune.models.paging.gguf_blocks import GGUF_BLOCKS
from fedtune.models.paging.paged_matrix import PagedMatrix
from fedtune.models.paging.row_formats import ROW_FORMATS, decode_rows
from fedtune.models.paging.source_tensors import list_safetensors, reverse_rope_pairs
from fedtune.models.paging.store import make_store, open_store

SHAPES = {"even": (64, 128), "odd": (13, 7), "row": (1, 65), "column": (5, 1)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_matrices(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}
    save_file(made, folder / "model.safetensors")
    return made


def make(folder: Path, form: str) -> Path:
    tensors = list_safetensors([folder / "model.safetensors"])
    return make_store(tensors, dict.fromkeys(SHAPES, form))


def open_all(folder: Path) -> dict[str, PagedMatrix]:
    return open_store(folder, torch.float32, FileBytes)


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "nf4"])
def test_every_range_of_rows_is_that_of_the_decoded_matrix(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_matrices(tmp_path)
    encode = ROW_FORMATS[form].encode
    monkeypatch.setattr(paged_matrix, "_STAGED", 300)  # several portions a range
    assert encode is not None
    for name, matrix in open_all(make(tmp_path, form)).items():
        assert matrix.offset % 4096 == 0
        wanted = decode_rows(form, encode(made[name]), matrix.width).float()
        assert torch.equal(matrix.copy_whole(), wanted)
        for start in range(0, matrix.rows, 6):
            for end in range(start + 1, matrix.rows + 1, 17):
                assert torch.equal(matrix.read_rows(start, end), wanted[start:end])
        chosen = torch.arange(0, matrix.rows, 2)
        assert torch.equal(matrix.gather_rows(chosen), wanted[chosen])


def test_exact_formats_change_no_bit_and_int8_at_most_half_a_level(tmp_path: Path) -> None:
    made = write_matrices(tmp_path, torch.bfloat16)
    for form in ("bf16", "fp32"):
        for name, matrix in open_all(make(tmp_path, form)).items():
            assert torch.equal(matrix.copy_whole(), made[name].float())
    for name, matrix in open_all(make(tmp_path, "int8")).items():
        wanted = made[name].float()
        level = wanted.abs().amax(1, keepdim=True) / 127
        assert bool(((matrix.copy_whole() - wanted).abs() <= 0.5001 * level).all())


def test_nf4_is_that_of_bitsandbytes() -> None:
    rows = torch.randn(8, 192, generator=torch.Generator().manual_seed(1))
    wanted = dequantize_4bit(*quantize_4bit(rows, blocksize=64, quant_type="nf4"))
    encode = ROW_FORMATS["nf4"].encode
    assert encode is not None
    assert torch.equal(decode_rows("nf4", encode(rows), 192), wanted)
    assert torch.equal(decode_rows("nf4", encode(torch.zeros(2, 5)), 5), torch.zeros(2, 5))


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "q5_0"])
def test_blocks_are_read_as_the_gguf_package_reads_them(name: str) -> None:
    kind = GGMLQuantizationType[name.upper()]
    rows = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    packed = quantize(rows, kind)
    assert packed.shape[1] == ROW_FORMATS[name].count_row_bytes(96) == 96 // GGUF_BLOCKS[name][0] * GGUF_BLOCKS[name][1]
    found = decode_rows(name, torch.from_numpy(packed), 96)
    assert torch.equal(found, torch.from_numpy(dequantize(packed, kind)))


def test_rows_of_queries_are_put_back_in_pairs_as_llama_cpp_took_them_apart() -> None:
    heads, half = 3, 4
    plain = torch.arange(heads * 2 * half)
    taken = plain.view(heads, 2, half).transpose(1, 2).flatten()  # llama.cpp's permutation
    assert torch.equal(taken[reverse_rope_pairs(len(plain), heads)], plain)


def test_a_store_is_made_once_and_again_when_the_source_or_the_format_changes(tmp_path: Path) -> None:
    write_matrices(tmp_path)
    first = make(tmp_path, "bf16")
    inode = (first / "weights.bin").stat().st_ino
    assert make(tmp_path, "bf16") == first
    assert (first / "weights.bin").stat().st_ino == inode
    assert make(tmp_path, "int8") != first
    os.utime(tmp_path / "model.safetensors", ns=(0, 0))
    assert make(tmp_path, "bf16") != first


def _cut(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 5000)


def _flip(folder: Path) -> None:
    with (folder / "weights.bin").open("r+b") as file:
        file.seek(4100)
        file.write(b"\xff")


def _move(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["matrices"]["odd"][3] += 4096
    (folder / "index.json").write_text(json.dumps(index))


def _empty(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def _lose(folder: Path) -> None:
    (folder / "weights.bin").unlink()


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_cut, "weights.bin was cut short"),
        (_flip, "weights.bin was changed or is damaged"),
        (_move, "index.json was changed"),
        (_empty, "index.json cannot be read"),
        (_lose, "weights.bin is missing"),
    ],
)
def test_a_store_that_is_not_what_was_written_is_refused(
    spoil: Callable[[Path], None], what: str, tmp_path: Path
) -> None:
    write_matrices(tmp_path)
    folder = make(tmp_path, "fp32")
    open_all(folder)
    spoil(folder)
    for _ in range(2):  # nothing of the first refusal is remembered as a check
        with pytest.raises(SourceError, match=rf"{what} since it was made; delete \S+, and it is made again$"):
            open_all(folder)


def test_a_store_that_was_only_touched_is_hashed_once_more_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_matrices(tmp_path)
    folder = make(tmp_path, "fp32")
    os.utime(folder / "weights.bin", ns=(0, 0))
    open_all(folder)
    monkeypatch.setattr(store, "hash_file", lambda _: pytest.fail("the hash was computed again"))
    open_all(folder)


def test_a_store_that_changes_or_ends_in_use_stops_the_step(tmp_path: Path) -> None:
    write_matrices(tmp_path)
    folder = make(tmp_path, "fp32")
    matrix = open_all(folder)["column"]
    changed = (folder / "weights.bin").stat().st_mtime_ns
    os.truncate(folder / "weights.bin", matrix.offset + 4)
    with pytest.raises(SourceError, match="was changed while it was in use; start again"):
        matrix.copy_whole()
    os.utime(folder / "weights.bin", ns=(changed, changed))
    with pytest.raises(SourceError, match="was cut short; delete its folder, and it is made again"):
        matrix.copy_whole()


def test_no_room_for_a_store_is_said_before_anything_is_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_matrices(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 4095}))
    with pytest.raises(SourceError, match=r"model\.paged needs 0 MB in \S+, which has 0 MB left; free some"):
        make(tmp_path, "fp32")
    assert not list(cache.glob("paged/*"))


def test_a_failed_conversion_leaves_no_store(tmp_path: Path, cache: Path) -> None:
    made = write_matrices(tmp_path)
    made["odd"][3, 3] = float("nan")
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="holds odd with infinite weights or nan; fetch another release"):
        make(tmp_path, "int8")
    assert not [one for one in cache.glob("paged/*") if one.is_dir()]


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_matrices(tmp_path)
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(SourceError, match=r"model\.safetensors is cut short; fetch it again"):
        make(tmp_path, "fp32")
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(SourceError, match="is not a safetensors file, or is cut short"):
        list_safetensors([file])
    save_file({"one": torch.zeros(2, 2, dtype=torch.float64)}, file)
    with pytest.raises(SourceError, match=r"holds one as F64, which model\.paged does not read; convert it to BF16"):
        list_safetensors([file])


def test_a_matrix_opens_its_file_again_in_another_process(tmp_path: Path) -> None:
    made = write_matrices(tmp_path)
    matrix = open_all(make(tmp_path, "fp32"))["even"]
    again: PagedMatrix = pickle.loads(pickle.dumps(matrix))
    assert again.reader is not matrix.reader
    assert torch.equal(again.copy_whole(), made["even"])
