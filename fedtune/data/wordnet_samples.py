"""Definitions of English nouns with their category, from WordNet 3.0 in the Debian package wordnet-base."""

import hashlib
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedtune.data.column import Values, objects
from fedtune.data.table import Classes, Table
from fedtune.errors import SourceError

__all__ = ["list_even_noun_definitions", "list_noun_definitions"]

_FIRST = 3
_CATEGORIES = (
    *("tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
"""The lexicographer files of nouns, from number 3 on."""
_FEWEST, _MOST = 300, 400
Definitions = Mapping[str, Sequence[str]]


def list_noun_definitions() -> dict[str, Table]:
    """Return all definitions, 82,115 in 26 categories of very different sizes; columns text, label and group."""
    return {"train": _make_table(_read_definitions(_find_file()))}


def list_even_noun_definitions() -> dict[str, Table]:
    """Return at most 400 definitions of each category that has 300: 24 categories, in the order of WordNet's files.

    Which ones is decided by their digests.
    """
    read = _read_definitions(_find_file())
    kept = {category: sorted(texts, key=_hash)[:_MOST] for category, texts in read.items() if len(texts) >= _FEWEST}
    return {"train": _make_table(kept)}


def _find_file() -> Path:
    """Return the file of nouns; SourceError if the package is not installed."""
    try:
        listed = subprocess.run(["dpkg", "-L", "wordnet-base"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SourceError(
            "sample:wordnet-nouns needs the Debian package wordnet-base; install it: apt-get install wordnet-base"
        ) from error
    [file] = [Path(line) for line in listed.splitlines() if line.endswith("/data.noun")]
    return file


def _read_definitions(file: Path) -> dict[str, list[str]]:
    """Return the definitions of each category, without the example sentences behind them."""
    found: dict[str, list[str]] = defaultdict(list)
    for category, definition in _iter_definitions(file):
        found[category].append(definition)
    return {category: found[category] for category in _CATEGORIES if category in found}


def _iter_definitions(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the category and the definition of each entry. Lines that begin with two spaces are the licence."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file} cannot be read ({error}); install wordnet-base again") from error
    for line in lines:
        if line.startswith("  "):
            continue
        entry, bar, gloss = line.partition(" | ")
        number = entry.split()[1:2]
        known = bar and number and number[0].isdecimal() and 0 <= int(number[0]) - _FIRST < len(_CATEGORIES)
        if not known:
            raise SourceError(f"{file} is not a file of WordNet 3.0's nouns; install wordnet-base again")
        yield _CATEGORIES[int(number[0]) - _FIRST], gloss.partition('; "')[0].strip()


def _hash(text: str) -> str:
    """Return a digest that says nothing of the one that splits are drawn by."""
    return hashlib.sha256(f"even sample: {text}".encode()).hexdigest()


def _make_table(definitions: Definitions) -> Table:
    names = tuple(definitions)
    texts = [text for own in definitions.values() for text in own]
    labels = [number for number, own in enumerate(definitions.values()) for _ in own]
    columns = {
        "text": Values(objects(texts)),
        "label": Values(np.array(labels, np.int64)),
        "group": Values(objects(texts)),  # one definition stays in one split, whatever it defines
    }
    return Table(columns, {"label": Classes(names)})
