"""``fedtune merge --as adapter``: merge adapters of one base into one adapter."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

__all__ = ["write_merged_adapter"]


_UNKNOWN = "its error is unknown, because this needs the base (DoRA)"


def write_merged_adapter(
    folders: Sequence[Path],
    output: Path,
    unit: Any,
    weights: Sequence[float],
    knobs: Sequence[Mapping[str, float]],
    rank: int | None,
    energy: float | None,
    as_json: bool,
) -> None:
    """Write the adapter and print the error of each module."""
    from fedtune.offline_merge.adapters.merge_adapters import RankLimit, compute_overall_error
    from fedtune.offline_merge.adapters.merge_adapters import merge_adapters as write

    modules = write(folders, output, unit, weights or None, RankLimit(rank, energy), knobs=knobs)
    error = compute_overall_error(modules)
    if as_json:
        from fedtune.json_text import json_text

        told = [{"module": one.module, "rank": one.rank, "error": one.error} for one in modules]
        click.echo(json_text({"path": str(output.absolute()), "error": error, "modules": told}))
        return
    ranks = sorted({one.rank for one in modules})
    made = f"{output}: {len(modules)} modules of rank {ranks[0]} to {ranks[-1]}"
    if math.isnan(error):
        click.echo(f"{made}; {_UNKNOWN}")
        return
    worst = max(modules, key=lambda one: one.error)
    click.echo(f"{made}, relative error {error:.2e}")
    click.echo(f"largest error {worst.error:.2e} in {worst.module}")
