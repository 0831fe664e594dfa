"""Packs the installed fedtune into a wheel, so that devices are installed from the files that the operator uses.

The wheel is written directly (PEP 427, PEP 376). A build would need the source tree and a build tool from an index.
"""

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import fedtune
from fedtune.errors import DeviceError
from fedtune.files import write_bytes_atomically
from fedtune.shipped import SHIPPED, shipped_folder

__all__ = ["write_wheel"]

_BEGINNING = (1980, 1, 1, 0, 0, 0)
"""The earliest timestamp in a zip file. It is fixed, so that the same files give the same wheel."""
_WHEEL = "Wheel-Version: 1.0\nGenerator: fedtune\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """Write the wheel and return its path; DeviceError when this fedtune is not installed."""
    found = distribution("fedtune")
    metadata = found.read_text("METADATA")
    if metadata is None:
        raise DeviceError("this fedtune is not installed, so that nothing tells what it needs; pip install it first")
    information = f"fedtune-{found.version}.dist-info"
    files = dict(_installed())
    files[f"{information}/METADATA"] = metadata.encode()
    files[f"{information}/WHEEL"] = _WHEEL.encode()
    files[f"{information}/entry_points.txt"] = (found.read_text("entry_points.txt") or "").encode()
    record = f"{information}/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    path = folder / f"fedtune-{found.version}-py3-none-any.whl"
    write_bytes_atomically(path, _zipped(files))
    path.chmod(0o644)
    return path


def _installed() -> Iterator[tuple[str, bytes]]:
    """Yield every file of the package with its name in a wheel, in order, including the shipped folders of a
    checkout.
    """
    package = Path(fedtune.__file__).parent
    yield from _files_below(package, "fedtune")
    for name in SHIPPED:
        folder = shipped_folder(name)
        if not folder.is_dir():
            raise DeviceError(f"the folder {name} is not installed here; pip install fedtune again")
        if not folder.is_relative_to(package):
            yield from _files_below(folder, f"fedtune/shipped/{name}")


def _files_below(folder: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _zipped(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _BEGINNING)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)
    return held.getvalue()
