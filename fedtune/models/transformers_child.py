"""Work that needs transformers, in a process of its own, so that a light one need not import it.

``python -P -m fedtune.models.transformers_child WORK SOURCE FOLDER`` fills a folder of the cache.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from fedtune.child_processes import environment, make_isolated_command

__all__ = ["main", "run_in_child"]


def run_in_child(work: str, source: str, folder: Path) -> bool:
    """Fill a folder in a child process; return whether it could. Otherwise the folder is left empty."""
    command = make_isolated_command("fedtune.models.transformers_child", work, source, str(folder))
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        for file in folder.iterdir():
            file.unlink()
    return done.returncode == 0


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
    from fedtune.models.plain_tokenizer import write_tokenizer
    from fedtune.models.pretrained import load_pretrained_tokenizer
    from fedtune.recipe.schema import ModelSettings

    write_tokenizer(load_pretrained_tokenizer(ModelSettings(source=f"path:{source}"), source), folder)


_WORK: Mapping[str, Callable[[str, Path], None]] = {
    "describe-gguf": _describe_gguf,
    "dequantise-gguf": _dequantise_gguf,
    "write-tokenizer": _write_tokenizer,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
