import errno
import hashlib
import os
from pathlib import Path

import pytest

from fedtune import files
from fedtune.errors import StoreError
from fedtune.seeds import derive_seed


def planted(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_written_file_holds_the_bytes_and_nothing_stands_beside_it(tmp_path: Path) -> None:
    files.write_bytes_atomically(tmp_path / "new" / "folder" / "a", b"content")
    assert (tmp_path / "new" / "folder" / "a").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a"]


def test_the_old_content_stays_until_the_block_ends_well(tmp_path: Path) -> None:
    files.write_bytes_atomically(tmp_path / "a", b"old")
    with files.replace_file_atomically(tmp_path / "a") as beside:
        beside.write_bytes(b"new")
        assert beside.parent == tmp_path
        assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_fault_inside_the_block_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    files.write_bytes_atomically(tmp_path / "a", b"old")
    with pytest.raises(fault), files.replace_file_atomically(tmp_path / "a") as beside:  # noqa: PT012
        beside.write_bytes(b"half")
        raise fault
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_bytes_atomically(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(*(os, "fsync", planted) if call == "fsync" else (Path, "replace", planted))
        with pytest.raises(StoreError, match=f"^cannot write {tmp_path / 'a'}: No space left on device; free or "):
            files.write_bytes_atomically(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_a_full_disk_inside_the_block_is_the_same_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No space left on device"), files.replace_file_atomically(tmp_path / "a"):
        planted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot write .*file/a: (File exists|Not a directory); free or choose"):
        files.write_bytes_atomically(tmp_path / "file" / "a", b"new")


def test_a_file_is_flushed_before_it_takes_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append((Path(name).name, (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes_atomically(tmp_path / "a", b"content")
    assert [("part" in name, named) for name, named in seen] == [(True, False), (False, True)]
    assert seen[1][0] == tmp_path.name


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    assert files.hash_file(tmp_path / "a") == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


def test_a_derived_seed_is_always_the_same_number() -> None:
    assert derive_seed(0) == int.from_bytes(hashlib.sha256(b"0").digest()[:8], "big") // 2
    assert (
        derive_seed(7, 3, 12, "dropout") == int.from_bytes(hashlib.sha256(b"7/3/12/dropout").digest()[:8], "big") // 2
    )


def test_seeds_of_different_places_differ_and_fit_sixty_three_bits() -> None:
    places = [(a, b, c, d) for a in range(3) for b in range(12) for c in range(12) for d in ("order", "dropout")]
    drawn = {derive_seed(*place) for place in places}
    assert len(drawn) == len(places)
    assert all(0 <= seed < 2**63 for seed in drawn)
