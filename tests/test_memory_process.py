import gc

import torch

from fedtune.memory import peak_rss, reset_peak_rss


def test_the_process_peak_sees_an_allocation_and_a_reset_forgets_it() -> None:
    megabytes = 2**20
    gc.collect()
    reset_peak_rss()
    before = peak_rss()
    block = torch.ones(200 * megabytes, dtype=torch.uint8)
    with_block = peak_rss()
    del block
    remembered = peak_rss()
    reset_peak_rss()
    assert 190 * megabytes < with_block - before < 260 * megabytes
    assert remembered - before > 190 * megabytes
    assert peak_rss() - before < 50 * megabytes
