import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedtune import sample_packages
from fedtune.errors import SourceError


def a_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
    return path


def a_tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def a_file(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 3
    return member


def a_link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("path", ["../evil", "tiny/../../evil", "/etc/evil", "tiny\\..\\evil"])
def test_a_zip_with_a_path_outside_its_folder_is_refused_whole(tmp_path: Path, path: str) -> None:
    archive = a_zip(tmp_path / "a.zip", "good", path)
    with pytest.raises(SourceError, match="outside its own folder"):
        sample_packages.extract_members(archive, ["good"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil"])
def test_a_tar_with_a_path_outside_its_folder_is_refused_whole(tmp_path: Path, path: str) -> None:
    archive = a_tar(tmp_path / "a.tar.gz", a_file("good"), a_file(path))
    with pytest.raises(SourceError, match="outside its own folder"):
        sample_packages.extract_members(archive, ["good"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_place_of_a_wanted_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    archive = a_tar(tmp_path / "a.tar.gz", a_link("wanted", kind, "/etc/passwd"))
    with pytest.raises(SourceError, match="no plain file 'wanted'"):
        sample_packages.extract_members(archive, ["wanted"], tmp_path / "out")


def test_a_symbolic_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("wanted")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(SourceError, match="no plain file 'wanted'"):
        sample_packages.extract_members(tmp_path / "a.zip", ["wanted"], tmp_path / "out")


@pytest.mark.parametrize("make", [a_zip, lambda path, *names: a_tar(path, *map(a_file, names))])
def test_only_the_wanted_members_are_unpacked(tmp_path: Path, make: object) -> None:
    archive = make(tmp_path / "a", "x/one", "x/two")  # type: ignore[operator]
    sample_packages.extract_members(archive, ["x/two"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["two"]


def test_bytes_that_are_no_archive_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"<html>no such page</html>")
    with pytest.raises(SourceError, match="not a readable archive"):
        sample_packages.extract_members(tmp_path / "a.whl", ["x"], tmp_path / "out")
