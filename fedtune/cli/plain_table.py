"""Plain tables that also work in a pipe."""

from rich import box
from rich.table import Table

__all__ = ["make_table"]


def make_table(*heads: str) -> Table:
    """Return a plain table; a heading that ends in ``>`` aligns its column to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head.removesuffix(">"), justify="right" if head.endswith(">") else "left", overflow="fold")
    return table
