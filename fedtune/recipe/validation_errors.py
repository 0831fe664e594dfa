"""Explains validation errors in one sentence: file, line, key, allowed values, nearest key."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

__all__ = ["UNIT_UNAVAILABLE", "Location", "explain_validation_error", "suggest_nearest"]

UNIT_UNAVAILABLE = "unit_unavailable"
"""The type of pydantic's error where a recipe names a unit that nobody publishes here."""
_OWN_SENTENCES = ("value_error", UNIT_UNAVAILABLE)
"""Types of errors whose message is a sentence already."""
_LONGEST = 200
"""The largest number of characters of a value in a message."""

Location = tuple[str | int, ...]
"""The keys and list indices from the root to a setting."""


def explain_validation_error(
    error: ValidationError,
    model: type[BaseModel],
    origin: str,
    lines: Mapping[Location, int] | None = None,
    overridden: Mapping[Location, str] | None = None,
) -> str:
    """Return the first validation error as one sentence: file, line, key, allowed values, nearest key."""
    detail = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    location = _without_tags(model, detail["loc"])
    where = _where(location, origin, lines or {}, _blamed(detail, location, overridden or {}))
    key = ".".join(str(part) for part in location)
    problem = _problem(detail, key, _siblings(model, location))
    return f"{where}: {problem}"


def _without_tags(model: type[BaseModel], location: Location) -> Location:
    """Remove the tags that pydantic adds to a location inside a discriminated union."""
    models, kept, tagged = [model], list[str | int](), False
    for part in location:
        if not tagged:
            kept.append(part)
            fields = _fields(models, part)
            tagged = any(field.discriminator for field in fields)
            models = [m for field in fields for m in _models_in(field.annotation)] if fields else models
        else:
            tagged = False
    return tuple(kept)


def _fields(models: Sequence[type[BaseModel]], name: str | int) -> list[FieldInfo]:
    return [m.model_fields[name] for m in models if isinstance(name, str) and name in m.model_fields]


def _blamed(detail: ErrorDetails, location: Location, overridden: Mapping[Location, str]) -> Mapping[Location, str]:
    """Return the overrides by the location they may have broken. A key set below a value breaks the value itself."""
    if detail["type"] in _OWN_SENTENCES:
        return overridden
    return {path[: len(location)]: item for path, item in overridden.items()}


def _where(location: Location, origin: str, lines: Mapping[Location, int], overridden: Mapping[Location, str]) -> str:
    prefixes = [location[:end] for end in range(len(location), 0, -1)]
    places = [f"--set {overridden[prefix]}" for prefix in prefixes if prefix in overridden]
    places += [f"{origin}, line {lines[prefix]}" for prefix in prefixes if prefix in lines]
    return places[0] if places else origin


def _problem(detail: ErrorDetails, key: str, siblings: Sequence[str]) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {suggest_nearest(key.rsplit('.', 1)[-1], siblings)}"
    if detail["type"] == "missing":
        return f"the key {key!r} is missing"
    if detail["type"] == "union_tag_not_found":
        return f"the key '{key}.kind' is missing"
    if detail["type"] == "union_tag_invalid":
        return f"{key}.kind is {detail['ctx']['tag']!r}, but must be one of {detail['ctx']['expected_tags']}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in _OWN_SENTENCES:
        return f"{key}: {message}" if key else message
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "it should be a mapping of keys to values"
    subject, should, rule = message.partition(" should ")
    found = _short(detail["input"])
    return f"{key} is {found}, but must {rule}" if should else f"{key} is {found}: {subject}"


def _short(value: Any) -> str:
    """Return the ``repr`` of a value, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def suggest_nearest(word: str, known: Sequence[str]) -> str:
    """Return ``did you mean 'x'?``, or all allowed words when none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(known))}"


def _siblings(model: type[BaseModel], location: Location) -> list[str]:
    """Return the keys that are allowed beside the last one of a location."""
    models = [model]
    for part in location[:-1]:
        if isinstance(part, str):
            inside = [m for field in _fields(models, part) for m in _models_in(field.annotation)]
            models = inside or models  # the tag of a union is no field
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]
