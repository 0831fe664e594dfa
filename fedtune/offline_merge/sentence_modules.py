"""The files of a sentence-transformers model beside its transformer: pooling and further modules.

Without them, the merged model would be loaded with another pooling and compute other sentence embeddings.
"""

from collections.abc import Iterator
from pathlib import Path

__all__ = ["sentence_files", "unmerged_modules"]

_NAMES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_NUMBERED = "[0-9]_*"
_WEIGHTS = "*.safetensors"


def sentence_files(folder: Path) -> list[Path]:
    """Return the files by their paths in the folder; empty for other models."""
    if not (folder / _NAMES[0]).is_file():
        return []
    named = [Path(name) for name in _NAMES if (folder / name).is_file()]
    inner = [found for part in _parts(folder) for kind in ("*.json", _WEIGHTS) for found in sorted(part.glob(kind))]
    return [*named, *(found.relative_to(folder) for found in inner)]


def unmerged_modules(folder: Path) -> list[str]:
    """Return the modules after the transformer that have weights. They are not merged."""
    if not (folder / _NAMES[0]).is_file():
        return []
    return [part.name for part in _parts(folder) if any(part.glob(_WEIGHTS))]


def _parts(folder: Path) -> Iterator[Path]:
    """Return the numbered module folders, such as 1_Pooling."""
    return (part for part in sorted(folder.glob(_NUMBERED)) if part.is_dir())
