"""The table at the end of a run: each domain before and after training, with its costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fedtune.tracking import ClientRecord, RoundRecord
from fedtune.tracking.run_summary import compare_before_and_after

__all__ = ["DomainRow", "make_domain_rows", "show_domain_table"]


@dataclass(frozen=True)
class DomainRow:
    """Test metric before and after training; bytes both ways; peak activation and process memory of clients."""

    domain: str
    before: float
    after: float
    bytes_up: int
    bytes_down: int
    activation_memory: int
    peak_memory: int


def make_domain_rows(rounds: Sequence[RoundRecord], clients: Mapping[int, str], figure: str) -> list[DomainRow]:
    """Return one row per domain, one for their mean and one over all. ``clients`` maps clients to domains."""
    sent = [one for record in rounds for one in record.client_records]
    found = compare_before_and_after(rounds, "test", figure)
    return [
        _make_row(domain, before, after, _select_clients(sent, clients, domain))
        for domain, (before, after) in found.items()
    ]


def _select_clients(sent: Sequence[ClientRecord], clients: Mapping[int, str], domain: str) -> list[ClientRecord]:
    return [s for s in sent if domain in ("all", "mean") or clients.get(s.client) == domain]


def _make_row(domain: str, before: float, after: float, sent: Sequence[ClientRecord]) -> DomainRow:
    return DomainRow(
        domain,
        before,
        after,
        sum(s.bytes_up for s in sent),
        sum(s.bytes_down for s in sent),
        max((s.activation_memory for s in sent), default=0),
        max((s.peak_memory for s in sent), default=0),
    )


def show_domain_table(rows: Sequence[DomainRow], figure: str, console: Console) -> None:
    """Print the rows as a table that fits 80 columns."""
    table = Table(title=f"test {figure}", box=None, header_style="bold", title_justify="left")
    for heading in ("domain", "before", "after", "sent up", "sent down", "activations"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for row in rows:
        figures = [f"{value:.4f}" for value in (row.before, row.after)]
        sizes = [f"{size / 1e6:.2f} MB" for size in (row.bytes_up, row.bytes_down, row.activation_memory)]
        table.add_row(row.domain, *figures, *sizes)
    console.print(table)
    process = max((row.peak_memory for row in rows), default=0)
    console.print(f"activations: peak memory kept for backward; a client's process used {process / 1e6:.0f} MB")
