"""Parse the values of options; UsageError if a value is invalid."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import click

__all__ = ["DEVICES", "Command", "MergeOptions", "parse_columns", "parse_numbers", "parse_size", "parse_step"]

DEVICES = ("auto", "cpu", "cuda", "mps")
"""The values of ``--device``, which are those of ``train.device``."""

_ALIKE = 0.8


class Command(click.Command):
    """A command that suggests an option only if it is very similar to the unknown one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raise UsageError with similar options."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            near = difflib.get_close_matches(error.option_name, error.possibilities or [], cutoff=_ALIKE)
            raise click.NoSuchOption(error.option_name, possibilities=near, ctx=ctx) from error


class MergeOptions(NamedTuple):
    """The options of ``fedtune merge``."""

    sources: tuple[str, ...]
    output: Path | None
    form: str
    dry_run: bool
    method: str | None
    base_model: str | None
    weights: str | None
    settings: tuple[str, ...]
    seed: int | None
    align: tuple[str, ...]
    relax: tuple[str, ...]
    renormalise: tuple[str, ...]
    tokenizer_source: str | None
    dtype: str | None
    max_rank: int | None
    energy: float | None
    calibration_data: str | None
    eval_data: str | None
    split: str
    columns: str | None
    task: str | None
    device: str
    max_shard_size: str
    report: bool
    trust_base: bool
    store: str | None
    as_json: bool

    def export_run(self, reference: str) -> Path:
        """Export the model of a run to the cache and return its folder."""
        from fedtune.library.cached_export import export_run_to_cache

        return export_run_to_cache(reference, self.store)


def parse_step(text: str) -> Any:
    """Parse a step: its name, or its name and settings in YAML."""
    from fedtune.recipe.yaml_text import YamlError, load

    try:
        return load(text)
    except YamlError as error:
        raise click.UsageError(f"{text!r} is not a step; write it as aim or 'aim: {{omega: 0.3}}'") from error


def parse_numbers(text: str | None) -> list[float]:
    """Parse numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise click.UsageError("write --weights as numbers with commas, e.g. 0.5,0.3,0.2") from error


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse the columns of a data source."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if any(not (equals and name) for _, equals, name in pairs):
        raise click.UsageError("write --columns as key=name,key=name, e.g. text=review,label=stars")
    return {key: name for key, _, name in pairs}


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Parse a size such as 500MB or 5GB."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise click.UsageError(f"{option} {text}: write it as 500MB or 5GB") from error
    if size <= 0:
        raise click.UsageError(f"{option} {text}: it must be above 0, e.g. 500MB")
    return size
