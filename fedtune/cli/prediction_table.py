"""The table of predicted memory beside what was held."""

from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table

from fedtune.cli.plain_table import make_table
from fedtune.tracking.prediction_summary import PredictionSummary
from fedtune.untrusted import clean_text

__all__ = ["make_prediction_table"]


def make_prediction_table(found: Sequence[PredictionSummary]) -> Table:
    """Return one line per device class. Both sizes are of anonymous memory; what was learned counts as a share too."""
    table = make_table("memory plan", "updates>", "predicted>", "held>", "median error>", "learned before>")
    for one in found:
        table.add_row(
            clean_text(one.device_class),
            str(one.contributions),
            decimal(one.predicted_anonymous),
            "-" if one.anonymous_memory is None else decimal(one.anonymous_memory),
            "-" if one.median_error is None else f"{one.median_error:+.1%}",
            f"{one.correction - 1:+.1%}" if one.correction != 1 else "-",
        )
    return table
