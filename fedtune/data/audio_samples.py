"""Spoken prompts of a telephone exchange in five languages, from Debian packages (asterisk-core-sounds-*-wav).

8 kHz, one voice in each language: what a model learns may be the voice.
"""

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedtune.data.column import Values, as_picture, objects
from fedtune.data.table import Classes, Kind, Recordings, Table
from fedtune.errors import SourceError
from fedtune.files import hash_file

__all__ = ["spoken_prompts"]

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
_SMALLEST = 44 + 2400
"""Bytes of a header and 0.15 seconds."""


def spoken_prompts() -> dict[str, Table]:
    """Columns audio, label (the language) and group (the name of the prompt, so that one prompt is in one split).

    Silence, recordings below 0.15 seconds and tones that several languages share are left out.
    """
    found = [(code, file) for code in LANGUAGES for file in _find_recordings(code)]
    digests = [hash_file(file) for _, file in found]
    often = Counter(digests)
    kept = [one for one, digest in zip(found, digests, strict=True) if often[digest] == 1]
    numbers = {code: number for number, code in enumerate(LANGUAGES)}
    kinds: dict[str, Kind] = {"audio": Recordings(), "label": Classes(tuple(LANGUAGES.values()))}
    columns = {
        "audio": Values(objects(as_picture(file) for _, file in kept)),
        "label": Values(np.array([numbers[code] for code, _ in kept], np.int64)),
        "group": Values(objects(_name_prompt(file) for _, file in kept)),
    }
    return {"train": Table(columns, kinds)}


def _find_recordings(code: str) -> Iterator[Path]:
    package = f"asterisk-core-sounds-{code}-wav"
    try:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SourceError(
            f"sample:spoken-prompts needs the Debian package {package}; install it: apt-get install {package}"
        ) from error
    for file in map(Path, sorted(listed.splitlines())):
        spoken = file.suffix == ".wav" and file.parent.name != "silence" and file.is_file()
        if spoken and file.stat().st_size >= _SMALLEST:
            yield file


def _name_prompt(file: Path) -> str:
    """Return the name of a prompt below the folder of its language, e.g. ``digits/1``."""
    return file.stem if file.parent.parent.name == "sounds" else f"{file.parent.name}/{file.stem}"
