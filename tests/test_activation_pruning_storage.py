"""What is kept of a tensor, in how many bytes, and what comes back."""

import math

import pytest
import torch
from torch import Tensor

from fedtune.memory import StorageMeter
from fedtune.techniques._layers.bit_packing import pack_bits as pack_bits
from fedtune.techniques._layers.bit_packing import unpack_bits as unpack_bits
from fedtune.techniques.pruning import _largest_entries
from fedtune.techniques.pruning._largest_entries import mask_largest_per_row
from fedtune.techniques.pruning._pruned_tensor import (
    PackedTensor,
    PruningRule,
    count_kept_entries,
    pack_pruned,
    unpack_pruned,
)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored_bytes(packed: PackedTensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors)


def largest_twin(row: list[float], keep: int) -> list[bool]:
    """By sorting: larger sizes first, of equals the first."""
    order = sorted(range(len(row)), key=lambda at: (-abs(row[at]), at))
    return [at in order[:keep] for at in range(len(row))]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 12345])
def test_a_mask_takes_one_bit_per_element_and_comes_back(count: int) -> None:
    mask = drawn(count) > 0.3
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.untyped_storage().nbytes() == math.ceil(count / 8)
    assert torch.equal(unpack_bits(bits, count), mask)


def test_the_lowest_bit_is_the_first_element() -> None:
    assert pack_bits(torch.tensor([True, True] + [False] * 6 + [True])).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("width", "prune", "kept"),
    [(10, 0.9, 1), (10, 0.7, 3), (1000, 0.29, 710), (7, 0.5, 3), (3, 0.9, 1), (1, 0.5, 1), (12345, 0.0, 12345)],
)
def test_the_number_kept_is_that_of_decimal_arithmetic_and_never_nothing(width: int, prune: float, kept: int) -> None:
    assert count_kept_entries(width, prune) == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [1, 3, 11])
def test_the_largest_are_kept_and_of_equals_the_first(keep: int, dtype: torch.dtype) -> None:
    rows = (drawn(5, 12, dtype=dtype) * 3).round() / 2  # few values, so that many are equal
    rows[0] = 0
    rows[1, 2:] = -1.5
    mask = mask_largest_per_row(rows, keep)
    assert mask.tolist() == [largest_twin(row, keep) for row in rows.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [1, 3, 11])
def test_long_rows_are_searched_in_pieces_to_the_same_end(
    keep: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_largest_entries, "_PIECE", 5)
    rows = (drawn(5, 12, dtype=dtype) * 3).round() / 2
    rows[0] = 0
    rows[1, 2:] = -1.5
    rows[2] = drawn(12, seed=1, dtype=dtype)
    rows[3, 3:5] = math.inf
    mask = mask_largest_per_row(rows, keep)
    assert mask.tolist() == [largest_twin(row, keep) for row in rows.tolist()]


def test_the_search_takes_no_memory_that_grows_with_the_tensor_but_its_mask() -> None:
    x = drawn(4, 1_000_000)
    for rows in (x, x.view(-1, 1000)):
        with StorageMeter() as meter:
            mask = mask_largest_per_row(rows, rows.shape[1] // 2)
        assert meter.peak_bytes <= 2 * mask.numel() + 30 * _largest_entries._PIECE
        assert mask.sum() == x.numel() // 2


def test_infinite_values_and_nans_count_as_largest_so_that_the_number_kept_stands() -> None:
    rows = torch.tensor([[1.0, math.nan, -math.inf, 2.0, math.nan]])
    assert mask_largest_per_row(rows, 3).tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 16), (2, 3, 4, 5)])
@pytest.mark.parametrize("prune", [0.3, 0.5, 0.99])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_what_comes_back_is_the_largest_entries_among_zeros(shape: tuple[int, ...], prune: float, per: str) -> None:
    x = drawn(*shape)
    width = shape[-1] if per == "row" else x.numel()
    found = unpack_pruned(*pack_pruned(x, PruningRule(prune), width))
    keep = mask_largest_per_row(x.reshape(-1, width), count_kept_entries(width, prune)).view(shape)
    assert torch.equal(found, torch.where(keep, x, 0.0))
    dropped = x[~keep].abs()
    assert not dropped.numel() or per == "row" or x[keep].abs().min() >= dropped.max()


@pytest.mark.parametrize("prune", [0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("half", [False, True])
def test_bytes_are_those_of_the_formula(prune: float, half: bool) -> None:
    """4 r + 1/8 per entry or 8 r, 2 r + 1/8 or 6 r in half precision: what is less."""
    n = 100_000
    r, value = 1 - prune, 2 if half else 4
    wanted = min(value * r + 1 / 8, (value + 4) * r) * n
    assert stored_bytes(pack_pruned(drawn(n), PruningRule(prune, half), n)) == round(wanted)


def test_seventy_percent_of_pruning_stores_less_than_a_third() -> None:
    x = drawn(64, 1000)
    assert stored_bytes(pack_pruned(x, PruningRule(0.7), x.numel())) == 0.33125 * 4 * x.numel()
    assert stored_bytes(pack_pruned(x, PruningRule(0.7, half_precision=True), x.numel())) < 0.19 * 4 * x.numel()


def test_the_list_takes_over_where_the_bitmap_would_cost_more() -> None:
    """At n = 320,000 an index takes four bytes: the bitmap is n / 8 = 40,000, the list 4 k."""
    n = 320_000
    kinds = {k: pack_pruned(drawn(n), PruningRule(float(f"{1 - k / n:.12f}")), n) for k in (9_999, 10_000, 10_001)}
    assert [kinds[k].layout.position_format for k in kinds] == ["list", "bitmap", "bitmap"]
    assert [stored_bytes(kinds[k]) for k in kinds] == [9_999 * 8, 10_000 * 4 + 40_000, 10_001 * 4 + 40_000]


@pytest.mark.parametrize(("width", "size"), [(256, 1), (257, 2), (32_768, 2), (32_769, 4)])
def test_an_index_is_as_narrow_as_its_row_allows(width: int, size: int) -> None:
    x = drawn(2, width)
    packed = pack_pruned(x, PruningRule(0.999), width)
    kept = count_kept_entries(width, 0.999)
    assert packed.layout.position_format == "list"
    assert stored_bytes(packed) == 2 * kept * (4 + size)
    assert torch.equal(unpack_pruned(*packed) != 0, mask_largest_per_row(x, kept))


def test_a_tensor_that_is_kept_whole_is_not_copied() -> None:
    x = drawn(4, 5).t()
    packed = pack_pruned(x, PruningRule(0.0), 4)
    assert packed.tensors[0].data_ptr() == x.data_ptr()
    assert unpack_pruned(*packed).stride() == x.stride()


def test_half_precision_is_left_out_for_a_tensor_it_cannot_hold() -> None:
    x = drawn(100)
    assert pack_pruned(x, PruningRule(0.5, half_precision=True), 100).tensors[0].dtype == torch.float16
    x[3] = 65504.0
    assert pack_pruned(x, PruningRule(0.5, half_precision=True), 100).tensors[0].dtype == torch.float16
    for beyond in (65505.0, -1e6, math.inf):
        x[3] = beyond
        packed = pack_pruned(x, PruningRule(0.5, half_precision=True), 100)
        assert packed.tensors[0].dtype == torch.float32
        assert unpack_pruned(*packed)[3] == beyond
    assert pack_pruned(x.bfloat16(), PruningRule(0.5, half_precision=True), 100).tensors[0].dtype == torch.bfloat16


def test_centring_prunes_what_differs_from_the_mean_and_puts_the_mean_back() -> None:
    x = drawn(6, 4, 10, dtype=torch.float64) + 5 * drawn(10, seed=1, dtype=torch.float64)
    packed = pack_pruned(x, PruningRule(0.5, centre_features=True), 10)
    means = x.mean((0, 1))
    keep = mask_largest_per_row((x - means).reshape(-1, 10), 5).view(x.shape)
    torch.testing.assert_close(unpack_pruned(*packed), torch.where(keep, x, means), rtol=1e-12, atol=0)
    assert stored_bytes(packed) == x.numel() // 2 * 8 + x.numel() // 8 + 10 * 8
