"""The table of a recipe's data sources: rows, rows that a filter removed, and examples per split."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fedtune.data import SourceCounts

__all__ = ["make_source_table"]


def make_source_table(sources: "Sequence[SourceCounts]") -> "Table":
    """Return a row per source. Joined sources also have a weight, and the examples that they give to each split."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    joined = any(source.parts for source in sources)
    for heading in ("source", "name", "rows", "removed by filter", *(("weight", *sources[0].parts) if joined else ())):
        table.add_column(heading, justify="left" if heading in ("source", "name") else "right", overflow="fold")
    for source in sources:
        shares = (f"{source.weight:g}", *map(str, source.parts.values())) if joined else ()
        table.add_row(source.source, source.name, str(source.rows), str(source.removed), *shares)
    return table
