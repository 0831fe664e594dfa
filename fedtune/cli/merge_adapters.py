"""``fedtune merge --format adapter``: merge adapters of one base into one adapter."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge

__all__ = ["write_merged_adapter"]


_UNKNOWN = "its error is unknown, because this needs the base (DoRA)"


def write_merged_adapter(folders: Sequence[Path], output: Path, merge: "AdapterMerge", as_json: bool) -> None:
    """Write the adapter and print the error of each module."""
    from fedtune.offline_merge.adapters.merge_adapters import compute_overall_error, merge_adapters

    modules = merge_adapters(folders, output, merge)
    error = compute_overall_error(modules)
    if as_json:
        from fedtune.json_text import json_text

        errors = [{"module": one.module, "rank": one.rank, "error": one.error} for one in modules]
        click.echo(json_text({"path": str(output.absolute()), "error": error, "modules": errors}))
        return
    ranks = sorted({one.rank for one in modules})
    summary = f"{output}: {len(modules)} modules of rank {ranks[0]} to {ranks[-1]}"
    if math.isnan(error):
        click.echo(f"{summary}; {_UNKNOWN}")
        return
    worst = max(modules, key=lambda one: one.error)
    click.echo(f"{summary}, relative error {error:.2e}")
    click.echo(f"largest error {worst.error:.2e} in {worst.module}")
