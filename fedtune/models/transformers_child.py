"""Work that needs transformers, in a process of its own, so that a light one need not import it.

``python -P -m fedtune.models.transformers_child WORK SOURCE FOLDER`` fills a folder of the cache.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["main"]


def main(work: str, source: str, folder: Path) -> None:
    """Do one kind of work. An error ends the process: whoever started it tries again itself, and tells the error."""
    _WORK[work](source, folder)


def _describe_gguf(source: str, folder: Path) -> None:
    from fedtune.models.paging.gguf_source import write_description

    write_description(Path(source), folder)


def _dequantise_gguf(source: str, folder: Path) -> None:
    from fedtune.models.gguf_loader import write_dequantised

    write_dequantised(Path(source), folder)


def _write_tokenizer(source: str, folder: Path) -> None:
    from fedtune.models.pretrained import load_pretrained_tokenizer
    from fedtune.models.tokenizer_copy import write_tokenizer
    from fedtune.recipe.schema import ModelSettings

    write_tokenizer(load_pretrained_tokenizer(ModelSettings(source=f"path:{source}"), source), folder)


_WORK: Mapping[str, Callable[[str, Path], None]] = {
    "describe-gguf": _describe_gguf,
    "dequantise-gguf": _dequantise_gguf,
    "write-tokenizer": _write_tokenizer,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
