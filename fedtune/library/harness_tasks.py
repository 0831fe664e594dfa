"""Task files of lm-evaluation-harness, checked before they run: they must name local data."""

from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import SourceError

__all__ = ["read_task_name"]

_BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")
"""Values of ``dataset_path`` that read local files."""


class _Loader(yaml.SafeLoader):
    """Reads a task without importing the functions that it names."""


_Loader.add_multi_constructor("!", lambda _, suffix, __: f"!{suffix}")


def read_task_name(path: Path) -> str:
    """Return the name of the task in a file; SourceError if it has none, or would download its data."""
    task = _read(path)
    if not isinstance(task.get("task"), str):
        raise SourceError(f"{path} has no key task with a name; --lm-eval takes the YAML file of one task")
    _require_local_data(path, task)
    return str(task["task"])


def _read(path: Path, depth: int = 0) -> dict[str, Any]:
    """The settings of a task over those of the files that it includes."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeError) as error:
        raise SourceError(f"cannot read {path}; check the path of the task") from error
    except yaml.YAMLError as error:
        raise SourceError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} is no mapping of keys to values; --lm-eval takes the YAML file of one task")
    included = found.get("include")
    if isinstance(included, str) and depth < 8:
        return {**_read(path.parent / included, depth + 1), **found}
    return found


def _require_local_data(path: Path, task: dict[str, Any]) -> None:
    if "custom_dataset" in task:
        return
    source = str(task.get("dataset_path"))
    if source not in _BUILDERS and not Path(source).exists():
        raise SourceError(
            f"{path}: dataset_path is {source!r}, which lm-eval would download; write one of {', '.join(_BUILDERS)} "
            "with dataset_kwargs: {data_files: ...}, or the path of a folder"
        )
    files = str((task.get("dataset_kwargs") or {}).get("data_files"))
    if "://" in files:
        raise SourceError(f"{path}: data_files {files} names a URL, which lm-eval would download; name local files")
