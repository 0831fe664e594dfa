"""What a sentence-transformers model has beside its transformer: how tokens are pooled, and what comes after that.

Without it the merged model would be read with a pooling of its own, which makes other sentences of the same tokens.
"""

from collections.abc import Iterator
from pathlib import Path

__all__ = ["sentence_files", "unmerged_modules"]

_NAMES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_NUMBERED = "[0-9]_*"
_WEIGHTS = "*.safetensors"


def sentence_files(folder: Path) -> list[Path]:
    """The files, by their paths in the folder; none where it is no such model."""
    if not (folder / _NAMES[0]).is_file():
        return []
    named = [Path(name) for name in _NAMES if (folder / name).is_file()]
    inner = [found for part in _parts(folder) for kind in ("*.json", _WEIGHTS) for found in sorted(part.glob(kind))]
    return [*named, *(found.relative_to(folder) for found in inner)]


def unmerged_modules(folder: Path) -> list[str]:
    """The modules after the transformer that have weights, which no merge reaches."""
    if not (folder / _NAMES[0]).is_file():
        return []
    return [part.name for part in _parts(folder) if any(part.glob(_WEIGHTS))]


def _parts(folder: Path) -> Iterator[Path]:
    """The folders that sentence-transformers numbers by their place, as 1_Pooling."""
    return (part for part in sorted(folder.glob(_NUMBERED)) if part.is_dir())
