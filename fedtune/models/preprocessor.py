"""Reads and writes the ``preprocessor_config.json`` of a model's folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.errors import ModelError
from fedtune.files import write_bytes_atomically
from fedtune.recipe.preprocessor_settings import Preprocessor, Resample
from fedtune.recipe.validation_errors import explain_validation_error

__all__ = ["FILE", "check_known", "from_settings", "save", "settings_of"]

FILE = "preprocessor_config.json"
Settings = Mapping[str, Any]
_BLACK, _ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_RESAMPLE: dict[int, Resample] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the resampling filters that torch has too."""
_FIRST_WARPED = 384
"""From this size on, ConvNeXT's preprocessor does not crop."""


def from_settings(settings: Settings, source: str) -> Preprocessor:
    """Convert the full settings of a transformers image processor.

    Raises ModelError for sizes that are not square and for unknown resizing rules.
    """
    kind = str(settings.get("image_processor_type", "")).removesuffix("Pil").removesuffix("Fast")
    _check_steps(settings, kind, source)
    scale, offset = _scale(settings)
    mean, std = _normal(settings, kind)
    found = {
        **_sizes(settings, kind, source),
        "resample": _resample(settings, source),
        "channels": "bgr" if settings.get("do_flip_channel_order") else "rgb",
        "scale": scale,
        "mean": _triple([part + offset for part in mean], source),
        "std": _triple(std, source),
    }
    try:
        return Preprocessor.model_validate(found)
    except ValidationError as error:
        raise ModelError(explain_validation_error(error, Preprocessor, f"{source}, {FILE}")) from error


_MEND = "set model.preprocessor to what it needs"


def check_known(processor: object, source: str) -> None:
    """Raise ModelError for a transformers image processor that overrides steps in a way not supported here."""
    kind = type(processor)
    name = kind.__name__.removesuffix("Pil").removesuffix("Fast")
    own = [step for step in _STEPS if not _owner(kind, step).startswith("transformers.image_processing_")]
    if own and name not in _KNOWN:
        raise ModelError(f"{source}: {name} does more than resize, crop and normalise images; {_MEND}")


_STEPS = ("resize", "center_crop", "rescale", "normalize", "_preprocess")
_KNOWN = frozenset(
    f"{name}ImageProcessor"
    for name in ("Beit", "ConvNext", "EfficientNet", "Levit", "MobileNetV2", "MobileViT", "PoolFormer", "Segformer")
)
"""Image processors whose own steps are supported here, or affect only label images."""


_STEP_SETTINGS = frozenset(
    ("do_center_crop", "do_convert_rgb", "do_normalize", "do_reduce_labels", "do_rescale", "do_resize")
)
"""The steps of all image processors; ``do_reduce_labels`` affects only label images."""
_OWN_SETTINGS = {
    "ConvNextImageProcessor": {"crop_pct"},
    "EfficientNetImageProcessor": {"include_top", "rescale_offset"},
    "MobileViTImageProcessor": {"do_flip_channel_order"},
    "PoolFormerImageProcessor": {"crop_pct"},
}
"""Settings that one image processor has, and others ignore."""
_WITHOUT_CROP = ("SegformerImageProcessor",)


def _check_steps(settings: Settings, kind: str, source: str) -> None:
    """Raise ModelError for a step that is switched on but not supported here, or not one of this image processor."""
    own = _OWN_SETTINGS.get(kind, set())
    others = set().union(*_OWN_SETTINGS.values()) - own
    steps = {name for name, value in settings.items() if value and (name.startswith("do_") or name in others)}
    unknown = sorted(steps - _STEP_SETTINGS - own)
    if settings.get("do_center_crop") and kind in _WITHOUT_CROP:
        unknown.append("do_center_crop")
    if unknown:
        ignored = unknown[0] in {*others, "do_center_crop"}
        reason = f"but {kind or 'its image processor'} ignores it" if ignored else "which is not supported"
        raise ModelError(f"{source}, {FILE}: {unknown[0]} is set, {reason}; {_MEND}")


def _owner(kind: type, step: str) -> str:
    """Return the module of the class that defines a step."""
    return next((base.__module__ for base in kind.__mro__ if step in vars(base)), "")


def _sizes(settings: Settings, kind: str, source: str) -> dict[str, Any]:
    """Return the settings ``side``, ``edge`` and ``resize``."""
    edge, shortest = _edge(settings, source)
    side = _square(settings["crop_size"], source) if settings.get("do_center_crop") else edge
    if not settings.get("do_resize", True):
        raise ModelError(f"{source}: its preprocessor does not resize images, but a batch needs one size; {_MEND}")
    if kind in _EDGE:
        edge, shortest = _EDGE[kind](edge, settings, shortest)
    return {"side": side, "edge": edge if edge != side else None, "resize": "shortest" if shortest else "both"}


def _convnext(edge: int, settings: Settings, _: bool) -> tuple[int, bool]:
    shrinks = edge < _FIRST_WARPED
    return (int(edge / (settings.get("crop_pct") or 224 / 256)) if shrinks else edge), shrinks


def _poolformer(edge: int, settings: Settings, shortest: bool) -> tuple[int, bool]:
    share = settings.get("crop_pct")
    return (edge, shortest) if share is None else (int(edge / share), True)


def _levit(edge: int, _: Settings, shortest: bool) -> tuple[int, bool]:
    return (int(256 / 224 * edge) if shortest else edge), shortest


_EDGE: dict[str, Callable[[int, Settings, bool], tuple[int, bool]]] = {
    "ConvNextImageProcessor": _convnext,
    "LevitImageProcessor": _levit,
    "PoolFormerImageProcessor": _poolformer,
}
"""Image processors that resize to another edge than their size: (edge, settings, shortest) -> (edge, shortest)."""


def _edge(settings: Settings, source: str) -> tuple[int, bool]:
    """Return the edge length in pixels, and whether it applies to the shortest edge."""
    size = settings.get("size") or {}
    if isinstance(size, Mapping) and size.get("shortest_edge") and not size.get("longest_edge"):
        return int(size["shortest_edge"]), True
    return _square(size, source), False


def _square(size: Any, source: str) -> int:
    sides = {size.get("height"), size.get("width")} if isinstance(size, Mapping) else {size}
    [side] = sides if len(sides) == 1 else [None]
    if not isinstance(side, int):
        raise ModelError(f"{source}: its preprocessor returns images of size {size}, which is not square; {_MEND}")
    return side


def _resample(settings: Settings, source: str) -> Resample:
    number = int(settings.get("resample", 2))
    if number not in _RESAMPLE:
        offered = ", ".join(f"{name} ({key})" for key, name in _RESAMPLE.items())
        raise ModelError(f"{source}: its preprocessor resamples by filter {number}, but only {offered} are; {_MEND}")
    return _RESAMPLE[number]


def _scale(settings: Settings) -> tuple[float, float]:
    """Return the factor of the pixel values and the offset that is subtracted afterwards."""
    if settings.get("do_rescale") is False:
        return 1.0, 0.0
    return float(settings.get("rescale_factor", 1 / 255)), 1.0 if settings.get("rescale_offset") else 0.0


def _normal(settings: Settings, kind: str) -> tuple[Any, Any]:
    """Return mean and standard deviation.

    MobileViT's processor never normalises; EfficientNet's may normalise twice.
    """
    normalises = bool(settings.get("do_normalize")) and kind != "MobileViTImageProcessor"
    mean = _per_channel(settings.get("image_mean"), _BLACK)
    std = _per_channel(settings.get("image_std"), _ONE)
    first = (mean, std) if normalises else (_BLACK, _ONE)
    if kind != "EfficientNetImageProcessor" or not settings.get("include_top"):
        return first
    return first[0], [one * other for one, other in zip(first[1], std, strict=True)]


def _per_channel(value: Any, default: tuple[float, ...]) -> Any:
    """Return one value per channel; a single number is that of all channels."""
    return [value] * 3 if isinstance(value, int | float) else value or default


def _triple(values: Any, source: str) -> tuple[float, float, float]:
    numbers = [float(value) for value in values]
    if len(numbers) != 3:
        raise ModelError(f"{source}: its preprocessor normalises {len(numbers)} channels instead of three; {_MEND}")
    return numbers[0], numbers[1], numbers[2]


def settings_of(preprocessor: Preprocessor) -> dict[str, Any]:
    """Convert to the settings of a transformers image processor."""
    edge = preprocessor.edge or preprocessor.side
    cuts = edge != preprocessor.side or preprocessor.resize == "shortest"
    size = {"shortest_edge": edge} if preprocessor.resize == "shortest" else {"height": edge, "width": edge}
    return {
        "image_processor_type": _processor(preprocessor, cuts=cuts),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": next(number for number, name in _RESAMPLE.items() if name == preprocessor.resample),
        "do_center_crop": cuts,
        "crop_size": {"height": preprocessor.side, "width": preprocessor.side},
        "do_rescale": True,
        "rescale_factor": preprocessor.scale,
        "do_normalize": True,
        "image_mean": list(preprocessor.mean),
        "image_std": list(preprocessor.std),
    } | ({"do_flip_channel_order": True} if preprocessor.channels == "bgr" else {})


def _processor(preprocessor: Preprocessor, *, cuts: bool) -> str:
    """Return an image processor class that supports all of these steps, in older versions of transformers too."""
    if preprocessor.channels == "bgr":
        plain = preprocessor.mean == _BLACK and preprocessor.std == _ONE
        if not plain:
            raise ModelError("no image processor of transformers both reverses the channels and normalises them")
        return "MobileViTImageProcessor"
    if not cuts:
        return "ViTImageProcessor"
    return "BitImageProcessor" if preprocessor.resize == "shortest" else "DeiTImageProcessor"


def save(preprocessor: Preprocessor, folder: Path) -> None:
    """Write the settings into a model's folder, for ``AutoImageProcessor``."""
    write_bytes_atomically(folder / FILE, (json.dumps(settings_of(preprocessor), indent=2) + "\n").encode())
