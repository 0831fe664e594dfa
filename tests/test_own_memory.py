"""A device's memory of earlier tasks: its files, its budget, its encryption, and what is refused."""

import multiprocessing
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedtune import files
from fedtune.device import own_memory
from fedtune.device.memory_file import decode_memory, encode_memory, make_mark
from fedtune.device.memory_key import get_key_path, load_or_create_memory_key, read_memory_key
from fedtune.device.own_memory import MemoryFolder, delete_own_memory
from fedtune.errors import MemoryBudgetError, StoreError

KEY, OTHER = bytes(range(32)), bytes(32)
KEYS = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])


def make_tensors(number: int, count: int = 100) -> dict[str, Tensor]:
    return {"replay/content": torch.full((count,), number, dtype=torch.uint8), "replay/sizes": torch.tensor([number])}


def make_memory(folder: Path, budget: int = 10_000, key: bytes | None = None, run: str = "run") -> MemoryFolder:
    return MemoryFolder(folder, run, budget, key)


def read(memory: MemoryFolder, visit: int) -> dict[str, Tensor]:
    """What the newest earlier visit stored."""
    [tensors] = memory.read_earlier(visit).values() or [{}]
    return tensors


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@KEYS
def test_only_files_of_earlier_visits_are_read(tmp_path: Path, key: bytes | None) -> None:
    memory = make_memory(tmp_path, key=key)
    assert memory.read_earlier(1) == {}
    memory.write(1, make_tensors(1))
    assert memory.read_earlier(1) == {}
    memory.write(2, make_tensors(2))
    memory.write(2, make_tensors(20))  # the next round of the same visit
    assert_equal_tensors(read(memory, 2), make_tensors(1))
    assert_equal_tensors(read(memory, 3), make_tensors(20))
    assert_equal_tensors(read(memory, 9), make_tensors(20))  # away for some visits
    assert list(memory.read_earlier(9)) == [2]


@KEYS
def test_the_newest_two_visits_are_kept(tmp_path: Path, key: bytes | None) -> None:
    memory = make_memory(tmp_path, key=key)
    for visit in (1, 2, 5, 10_001):
        memory.write(visit, make_tensors(visit % 100))
    assert list_names(tmp_path) == ["memory-0005.safetensors", "memory-10001.safetensors"]


@KEYS
def test_files_never_exceed_the_budget(tmp_path: Path, key: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while one is written: the folder is looked at before and after each rename, and after each flush."""
    budget, seen = 2_600, []

    def look_around(real: Callable[..., object]) -> Callable[..., object]:
        def looking(*args: object) -> object:
            result = real(*args)
            seen.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            return result

        return looking

    load_or_create_memory_key(tmp_path)  # it is written once, elsewhere
    monkeypatch.setattr(files, "_flush", look_around(files._flush))
    monkeypatch.setattr(own_memory, "write_bytes_atomically", look_around(files.write_bytes_atomically))
    memory = make_memory(tmp_path, budget, key)
    for visit in range(1, 6):
        for part in (1, 2, 3):
            (tmp_path / ".memory-0001.safetensors.x.part").write_bytes(bytes(1_000))  # of a killed process
            memory.write(visit, make_tensors(visit * part, 850))
    assert len(seen) == 45
    assert budget - 600 < max(seen) <= budget


@KEYS
def test_a_file_of_more_than_half_the_budget_is_refused_and_nothing_changes(tmp_path: Path, key: bytes | None) -> None:
    memory = make_memory(tmp_path, 2_000, key)
    memory.write(1, make_tensors(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MemoryBudgetError, match=r"takes \d+ bytes, and it may take 1000, half of the budget") as error:
        memory.write(2, make_tensors(2, 900))
    assert error.value.code == "storage-exceeded"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_without_room_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(tmp_path / "own" / "run", 5_000)
    memory.require_disk_room()
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(4_000))
    with pytest.raises(
        MemoryBudgetError, match="may store 5000 more bytes for the run, but its disk has 4000 left"
    ) as e:
        memory.require_disk_room()
    assert (e.value.code, e.value.counts) == ("storage-short", {"needed_kb": 5, "free_kb": 4})
    memory.write(1, make_tensors(1, 1_500))
    memory.require_disk_room()  # what it holds already takes part of its budget


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_ciphertexts_hide_the_content_and_differ(tmp_path: Path) -> None:
    memory = make_memory(tmp_path, key=KEY)
    memory.write(1, make_tensors(7))
    first = (tmp_path / "memory-0001.safetensors").read_bytes()
    memory.write(1, make_tensors(7))
    second = (tmp_path / "memory-0001.safetensors").read_bytes()
    assert first != second
    assert bytes([7] * 8) not in first
    assert b"replay" not in first
    assert_equal_tensors(read(memory, 2), make_tensors(7))


def test_plain_files_are_safetensors_and_always_the_same_bytes_on_a_device(tmp_path: Path) -> None:
    contents = []
    for home in ("a", "a", "b"):
        folder = tmp_path / home / "own" / "run"
        make_memory(folder).write(1, make_tensors(7))
        contents.append((folder / "memory-0001.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert_equal_tensors(safetensors.torch.load(contents[0]), safetensors.torch.load(contents[2]))


@KEYS
def test_any_changed_byte_is_found(tmp_path: Path, key: bytes | None) -> None:
    memory = make_memory(tmp_path, key=key)
    memory.write(1, make_tensors(7))
    path = tmp_path / "memory-0001.safetensors"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]]))
        with pytest.raises(StoreError, match=r"memory-0001.*; delete it to start this run's memory anew") as error:
            memory.read_earlier(2)
        assert error.value.code == "memory-damaged"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(StoreError, match="start this run's memory anew"):
            memory.read_earlier(2)
    path.write_bytes(content + bytes(1))
    with pytest.raises(StoreError, match="start this run's memory anew"):
        memory.read_earlier(2)


@KEYS
def test_a_file_of_another_run_or_visit_is_foreign(tmp_path: Path, key: bytes | None) -> None:
    make_memory(tmp_path, key=key).write(1, make_tensors(7))
    with pytest.raises(StoreError, match=r"another run.*start this run's memory anew"):
        make_memory(tmp_path, key=key, run="other").read_earlier(2)
    (tmp_path / "memory-0001.safetensors").rename(tmp_path / "memory-0002.safetensors")
    with pytest.raises(StoreError, match="another run"):
        make_memory(tmp_path, key=key).read_earlier(3)


def test_a_wrong_key_or_none_is_refused(tmp_path: Path) -> None:
    make_memory(tmp_path, key=KEY).write(1, make_tensors(7))
    with pytest.raises(StoreError, match="has another key; delete it"):
        make_memory(tmp_path, key=OTHER).read_earlier(2)
    with pytest.raises(StoreError, match="is encrypted, but the recipe does not ask for that"):
        make_memory(tmp_path).read_earlier(2)
    make_memory(tmp_path).write(1, make_tensors(7))
    with pytest.raises(StoreError, match="is not encrypted, but the recipe asks for that"):
        make_memory(tmp_path, key=KEY).read_earlier(2)


def test_a_checkpoint_without_a_mark_and_a_file_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory-0001.safetensors"
    safetensors.torch.save_file(make_tensors(1), path)
    with pytest.raises(StoreError, match="is damaged"):
        make_memory(tmp_path).read_earlier(2)
    path.write_bytes(bytes(20_000))
    with pytest.raises(StoreError, match="larger than the budget of 10000 bytes"):
        make_memory(tmp_path).read_earlier(2)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        make_memory(tmp_path).read_earlier(2)


def test_the_key_is_random_private_and_stays(tmp_path: Path) -> None:
    keys = [load_or_create_memory_key(tmp_path / home) for home in ("a", "a", "b")]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 32
    assert stat.S_IMODE(get_key_path(tmp_path / "a").stat().st_mode) == 0o600


def test_a_key_that_others_can_read_or_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mounted"
    with pytest.raises(StoreError, match="cannot be read"):
        read_memory_key(path)
    path.write_bytes(bytes(32))
    path.chmod(0o644)
    with pytest.raises(StoreError, match="can be read by other users; chmod 600 it"):
        read_memory_key(path)
    path.chmod(0o600)
    assert read_memory_key(path) == bytes(32)
    path.write_bytes(bytes(16))
    with pytest.raises(StoreError, match="has 16 bytes and needs 32; make one by head -c 32 /dev/urandom"):
        read_memory_key(path)


def test_the_key_is_deleted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own" / "run"
    memory = make_memory(folder, key=load_or_create_memory_key(folder))
    memory.write(1, make_tensors(1))
    (folder / "round-0001.safetensors").write_bytes(b"of a technique")
    deleted: list[str] = []
    real = Path.unlink

    def note_and_delete(path: Path, missing_ok: bool = False) -> None:
        deleted.append(path.name)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", note_and_delete)
    delete_own_memory(folder)
    assert deleted[:2] == ["run.key", "memory-0001.safetensors"]
    assert list_names(folder) == ["round-0001.safetensors"]
    assert make_memory(folder).read_earlier(2) == {}


def test_the_mark_does_not_name_the_run() -> None:
    assert "secret-run" not in make_mark("secret-run", 1)
    assert make_mark("a", 1) != make_mark("a", 2) != make_mark("b", 2)
    assert_equal_tensors(decode_memory(encode_memory(make_tensors(3), "m", KEY), "m", KEY), make_tensors(3))


def _write_and_die(folder: str, budget: int, point: str) -> None:
    """Write a memory file and die by SIGKILL at a point."""
    real_replace, real_flush = Path.replace, files._flush

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_die(path: Path, target: Path) -> None:
        real_replace(path, target)
        die()

    def cut_and_die(path: Path) -> None:
        os.truncate(path, 50)
        real_flush(path)
        die()

    if point == "half-written":
        files._flush = cut_and_die
    else:
        Path.replace = die if point == "before rename" else replace_and_die  # type: ignore[assignment]
    make_memory(Path(folder), budget, KEY).write(2, make_tensors(22, 200))


@pytest.mark.parametrize("budget", [1_200, 4_000], ids=["short", "ample"])
@pytest.mark.parametrize("point", ["half-written", "before rename", "after rename"])
def test_a_killed_write_leaves_no_broken_file(tmp_path: Path, point: str, budget: int) -> None:
    """The old file of the visit stays until the rename if the budget has room for both; the earlier one always."""
    memory = make_memory(tmp_path, budget, KEY)
    memory.write(1, make_tensors(1, 10))
    memory.write(2, make_tensors(2, 10))
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(str(tmp_path), budget, point))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert memory.count_bytes() <= budget
    expected = 22 if point == "after rename" else 2 if budget == 4_000 else 1
    assert [int(read(memory, visit)["replay/sizes"]) for visit in (3, 2)] == [expected, 1]
    memory.write(2, make_tensors(23, 200))  # the round is begun again
    assert list_names(tmp_path) == ["memory-0001.safetensors", "memory-0002.safetensors"]
    assert int(read(memory, 3)["replay/sizes"]) == 23
