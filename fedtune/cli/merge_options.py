"""What ``fedtune merge`` reads from single options; UsageError for what it cannot read."""

from typing import Any

import click

__all__ = ["columns", "numbers", "size", "unit"]


def unit(text: str) -> Any:
    """A step by its name, or with its settings in YAML."""
    from fedtune.yaml_text import YamlError, load

    try:
        return load(text)
    except YamlError as error:
        raise click.UsageError(f"{text!r} is no step; write it as aim or 'aim: {{omega: 0.3}}'") from error


def numbers(text: str | None) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise click.UsageError("write --weights as numbers with commas, e.g. 0.5,0.3,0.2") from error


def columns(text: str | None) -> dict[str, str]:
    """Columns of a data source by what they hold."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if any(not (equals and name) for _, equals, name in pairs):
        raise click.UsageError("write --columns as key=name,key=name, e.g. text=review,label=stars")
    return {key: name for key, _, name in pairs}


def size(text: str) -> int:
    """Bytes, written as 500MB or 5GB."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise click.UsageError(f"--shard-size {text}: write it as 500MB or 5GB") from error
