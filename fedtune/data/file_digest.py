"""The digest of a file's content, remembered for as long as its size, time of change and place stay what they are."""

import hashlib
from pathlib import Path

from fedtune.files import hash_file, write_bytes_atomically
from fedtune.paths import get_cache_folder

__all__ = ["digest_files"]


def digest_files(files: list[Path]) -> str:
    """One digest of several files in their order; an unchanged large file is not read again."""
    return hashlib.sha256(" ".join(_digest_file(file) for file in files).encode()).hexdigest()


def _digest_file(file: Path) -> str:
    found = file.stat()
    seen = f"{file.absolute()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
    remembered = get_cache_folder() / "digests" / hashlib.sha256(seen.encode()).hexdigest()
    if remembered.exists():
        return remembered.read_text(encoding="ascii")
    digest = hash_file(file)
    write_bytes_atomically(remembered, digest.encode())
    return digest
