"""The benchmark's calculator against the published figures and counts made by hand."""

import pytest
import torch
from torch import nn

from benchmarks.mobiletl_memory import accounting, block, chart, counted


def test_the_calculator_gives_the_papers_figures_of_a_block() -> None:
    found = accounting()
    assert found["v2_less"] == pytest.approx(46.3, abs=0.2)
    assert found["v3_less"] == pytest.approx(53.3, abs=0.2)


def test_the_chart_gives_the_papers_figures_of_five_blocks() -> None:
    found = chart()
    assert found["chart_flops_less"] == pytest.approx(36, abs=0.2)
    assert found["chart_stored_less"] > 69


@pytest.mark.parametrize(("kind", "stock", "ours"), [("v2", 38, 14.375), ("v3", 44, 14.773)])
def test_a_blocks_real_bytes_are_the_formulas(kind: str, stock: float, ours: float) -> None:
    """In maps of the block's narrow end; beside them the norms' batch statistics. V3's gate keeps 0.398 of one."""
    a = 4 * 8 * 96 * 49
    found = block(kind)
    assert found["stock_bytes"] == pytest.approx(stock * a, rel=0.02)
    assert found["mobiletl_bytes"] == pytest.approx(ours * a, rel=0.02)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, groups=3)
        self.two = nn.Conv2d(6, 2, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> "_Two":
        self.loss = self.two(self.one(pixel_values)).sum()
        return self


def test_products_are_counted_for_what_is_trained() -> None:
    model = _Two()
    batch = {"pixel_values": torch.zeros(2, 3, 5, 5), "labels": torch.zeros(2)}
    first, second = 2 * 2 * 6 * 9 * 9, 2 * 2 * 2 * 9 * 6
    assert counted(model, batch) == 2 * first + 3 * second
    model.one.requires_grad_(False)
    assert counted(model, batch) == first + 2 * second
