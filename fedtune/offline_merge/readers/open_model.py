"""Open a model that the user named, without reading its tensors."""

from collections.abc import Callable
from pathlib import Path

from fedtune.errors import SourceError
from fedtune.models.sources import resolve_model_source
from fedtune.offline_merge.quantisation_checks import check_plain
from fedtune.offline_merge.readers.bitsandbytes_model import FourBitModelReader, is_four_bit_checkpoint
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.readers.safetensors_folder import SafetensorsModelReader

__all__ = ["RunExporter", "open_base", "open_model", "refuse_runs"]

RunExporter = Callable[[str], Path]
"""Writes the result of a run, given by id, to a folder of safetensors and returns the folder."""

_KINDS = ("hub", "path", "gguf", "sample", "run")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.spm", "*.codes"]


def refuse_runs(reference: str) -> Path:
    """Raise SourceError for run:ID. For callers without a run store."""
    raise SourceError(f"run:{reference} needs a run store; export the run first")


def open_model(source: str, runs: RunExporter = refuse_runs) -> ModelReader:
    """Open path:FOLDER, gguf:FILE, hub:ID, sample:NAME, run:ID, or BASE+ADAPTER.

    A name without a kind is the folder or the GGUF file of that name if it exists, or else a hub id. Raises SourceError
    or ModelError.
    """
    kind, name = _kind(source)
    if kind is None and "+" in source:
        base, _, adapter = source.partition("+")
        return _adapted(source, _folder(adapter), open_model(base, runs))
    if kind == "gguf":
        return _gguf(Path(name).expanduser(), source)
    folder = runs(name) if kind == "run" else _folder(source)
    if _is_adapter(folder):
        from fedtune.offline_merge.readers.adapter_model import read_base_model_name

        _check_one(folder)
        return _adapted(source, folder, open_model(_named(read_base_model_name(folder)), runs))
    return _stored(folder, source)


def open_base(base: str) -> ModelReader:
    """Open the base that an adapter names, if it is available. Nothing is downloaded. SourceError if it is not."""
    name = _named(base)
    if not name.startswith("hub:"):
        return open_model(name)
    return _stored(_fetched(name.removeprefix("hub:"), local=True), name)


def _kind(source: str) -> tuple[str | None, str]:
    """Return the kind of a source and its name; None for a folder written with its adapter."""
    kind, colon, name = source.partition(":")
    if "+" in source and not Path(name if colon else source).expanduser().exists():
        return None, source
    if colon and kind in _KINDS:
        return kind, name
    return ("gguf", source) if source.endswith(".gguf") and not Path(source).is_dir() else ("path", source)


def _named(base: str) -> str:
    """Return the source for a base that an adapter names: a folder, a hub id, or a source of fedtune."""
    return base if base.partition(":")[0] in _KINDS or Path(base).expanduser().exists() else f"hub:{base}"


def _folder(source: str) -> Path:
    """Return the folder of a source. A model on the hub is downloaded."""
    kind, colon, name = source.partition(":")
    if not colon or kind not in _KINDS:
        path = Path(source).expanduser()
        return path if path.exists() else _fetched(source)
    if kind == "hub":
        return _fetched(name)
    return Path(name).expanduser() if kind == "path" else Path(resolve_model_source(source, "the model"))


def _fetched(name: str, *, local: bool = False) -> Path:
    """Download a repository of the hub, ID or ID@REVISION, to the local cache, without pickles."""
    from huggingface_hub import snapshot_download

    from fedtune.models.transformers_logging import silence_transformers

    name, _, revision = name.partition("@")
    try:
        with silence_transformers():
            return Path(
                snapshot_download(name, revision=revision or None, allow_patterns=_WANTED, local_files_only=local)
            )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"there is no folder {name}, and the hub does not give it ({type(error).__name__}); check the name"
        ) from error


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _check_one(folder: Path) -> None:
    """Raise SourceError for a folder with both an adapter and a model, because it is ambiguous."""
    others = [file.name for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    if others and (folder / "config.json").is_file():
        raise SourceError(
            f"{folder} holds a model ({others[0]}) and an adapter (adapter_config.json); remove the one that is not "
            "meant"
        )


def _adapted(source: str, folder: Path, base: ModelReader) -> ModelReader:
    from fedtune.offline_merge.readers.adapter_model import AdapterModelReader  # imports peft

    if not _is_adapter(folder):
        raise SourceError(f"{folder} is no adapter: it has no adapter_config.json; write BASE+ADAPTER")
    return AdapterModelReader(folder, source, base)


def _gguf(file: Path, source: str) -> ModelReader:
    if not file.is_file():
        raise SourceError(f"there is no file {file}; check the path")
    from fedtune.offline_merge.readers.gguf_model import GgufModelReader  # imports transformers

    return GgufModelReader(file, source)


def _stored(folder: Path, source: str) -> ModelReader:
    opened = SafetensorsModelReader(folder, source)
    if not opened.tensor_infos:
        raise SourceError(f"{source} holds no tensor; fetch it again")
    if is_four_bit_checkpoint(opened):
        return FourBitModelReader(opened)
    check_plain(folder, source, opened.tensor_infos)
    return opened
