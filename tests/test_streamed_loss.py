"""Cross-entropy under a head that is read a few rows at a time, beside the plain one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.models.paging.byte_readers import FileBytes
from fedtune.models.paging.paged_matrix import PagedMatrix
from fedtune.models.paging.streamed_loss import HeadRows, streamed_cross_entropy

WIDE, HIGH, TOKENS = 8, 11, 13


def a_head(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, PagedMatrix, Tensor, Tensor]:
    """Hidden states [n, h], W [v, h] and its store, b [v] and labels [n], three of which do not count."""
    random = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=random) for s in ((TOKENS, WIDE), (HIGH, WIDE), (HIGH,)))
    labels = torch.randint(0, HIGH, (TOKENS,), generator=random)
    labels[[0, 6, 12]] = -100
    labels[[1, 2]] = torch.tensor([0, HIGH - 1])
    (folder / "head").write_bytes(weight.numpy().tobytes())
    matrix = PagedMatrix("head", FileBytes(folder / "head"), "fp32", HIGH, WIDE, 0, dtype)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), matrix, bias.to(dtype), labels


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("chunk", [1, 7, 11, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_those_of_the_whole_for_any_chunk(chunk: int, dtype: torch.dtype, tmp_path: Path) -> None:
    hidden, weight, matrix, bias, labels = a_head(tmp_path, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for one in (None, bias):
        loss = streamed_cross_entropy(hidden, HeadRows(matrix, one), labels, chunk_rows=chunk)
        wanted = F.cross_entropy(F.linear(hidden, weight, one), labels)
        assert close(loss.detach(), wanted.detach(), tolerance)
        [found], [expected] = torch.autograd.grad(3 * loss, hidden), torch.autograd.grad(3 * wanted, hidden)
        assert close(found, expected, tolerance)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_far_from_zero_and_ties_neither_overflow_nor_vanish(size: float, tmp_path: Path) -> None:
    hidden, weight, matrix, bias, labels = a_head(tmp_path)
    far = bias + size
    far[[0, 5, HIGH - 1]] += 1e4  # maxima that tie, and that are far above the others
    loss = streamed_cross_entropy(hidden, HeadRows(matrix, far), labels, chunk_rows=4)
    wanted = F.cross_entropy(F.linear(hidden, weight, far), labels)
    assert close(loss.detach(), wanted.detach(), 1e-12)
    [found], [expected] = torch.autograd.grad(loss, hidden), torch.autograd.grad(wanted, hidden)
    assert close(found, expected, 1e-9)


def test_a_given_number_of_items_divides_and_no_label_at_all_is_no_loss(tmp_path: Path) -> None:
    hidden, weight, matrix, bias, labels = a_head(tmp_path)
    loss = streamed_cross_entropy(hidden, HeadRows(matrix, bias), labels, num_items=torch.tensor(40.0))
    assert close(loss.detach(), F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum") / 40, 1e-12)
    nothing = streamed_cross_entropy(hidden, HeadRows(matrix, bias), torch.full_like(labels, -100))
    assert float(nothing.detach()) == 0
    assert not torch.autograd.grad(nothing, hidden)[0].any()


def test_a_label_beyond_the_head_is_refused(tmp_path: Path) -> None:
    hidden, _, matrix, bias, labels = a_head(tmp_path)
    labels[3] = HIGH
    with pytest.raises(IndexError, match="a label is out of range: the head head has 11 rows"):
        streamed_cross_entropy(hidden, HeadRows(matrix, bias), labels)


def test_the_head_is_read_once_and_its_gradient_is_all_that_is_kept(tmp_path: Path) -> None:
    hidden, _, matrix, bias, labels = a_head(tmp_path)
    loss = streamed_cross_entropy(hidden, HeadRows(matrix, bias), labels, chunk_rows=3)
    loss.backward()
    assert matrix.reader.bytes_read == matrix.nbytes == HIGH * WIDE * 4
