"""What counts as one storage, from when on, and to whom it belongs."""

import torch
from torch import nn

from fedtune.memory import StorageMeter

FLOAT = 4


def test_views_count_once_and_what_is_dropped_counts_in_the_peak_only() -> None:
    with StorageMeter() as meter:
        one = torch.ones(100)
        view = one[10:20].reshape(2, 5)
        held = meter.current_bytes
        del one
        still = meter.current_bytes
        del view
    assert (held, still, meter.current_bytes, meter.peak_bytes) == (400, 400, 0, 400)


def test_the_peak_is_the_largest_sum_held_at_one_time() -> None:
    with StorageMeter() as meter:
        first = torch.ones(100)
        second = torch.ones(50)
        del first
        third = torch.ones(75)
    assert (meter.peak_bytes, meter.current_bytes) == (600, 500)
    del second, third


def test_addresses_that_are_used_again_count_again() -> None:
    with StorageMeter() as meter:
        addresses = {torch.ones(1000).untyped_storage().data_ptr() for _ in range(200)}
        assert meter.current_bytes == 0
        again = [torch.ones(1000) for _ in range(3)]
        assert meter.current_bytes == 3 * 4000
    assert len(addresses) < 200
    assert meter.peak_bytes == 3 * 4000
    del again


def test_a_parameter_whose_data_is_swapped_does_not_pass_its_exemption_on() -> None:
    parameter = nn.Parameter(torch.ones(100))
    with StorageMeter(excluded=[parameter]) as meter:
        parameter.data = torch.zeros(100)
        others = [torch.ones(100) for _ in range(50)]
        assert meter.current_bytes == 51 * 100 * FLOAT
    del others


def test_a_storage_that_is_emptied_and_filled_again_counts_as_it_is() -> None:
    with StorageMeter() as meter:
        hidden = torch.ones(100)
        hidden.untyped_storage().resize_(0)
        emptied = meter.current_bytes
        other = torch.ones(90)
        hidden.untyped_storage().resize_(400)
        hidden.copy_(torch.ones(100))
        filled = meter.current_bytes
        other.resize_(200)
    assert (emptied, filled, meter.current_bytes) == (0, 400 + 360, 400 + 800)
    assert meter.peak_bytes == max(400 + 360 + 400, 400 + 800)


def test_resizing_is_left_alone_after_the_block() -> None:
    before = torch.UntypedStorage.resize_
    with StorageMeter(), StorageMeter():
        pass
    assert torch.UntypedStorage.resize_ is before


def test_what_was_there_before_counts_only_once_it_is_kept_for_the_backward_pass() -> None:
    batch, weight = torch.ones(8, 5), torch.ones(5, requires_grad=True)
    with StorageMeter(excluded=[weight]) as meter:
        batch[1:].add_(1)
        assert meter.current_bytes == 0
        product = batch[2:] * weight
        assert meter.current_bytes == product.nbytes + batch.nbytes
    del product


def test_a_tensor_made_from_numbers_counts() -> None:
    with StorageMeter() as meter:
        numbers = torch.tensor([1.0, 2.0, 3.0])
    assert meter.current_bytes == 3 * FLOAT
    del numbers
