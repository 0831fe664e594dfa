"""``offload``: gradients bit-equal, memory as planned, and a clean way back to memory when the disk takes no more."""

import copy
import errno
import multiprocessing
import os
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune import techniques
from fedtune.errors import FedtuneWarning, ModelError, RecipeError
from fedtune.techniques._codecs.activation_file import ActivationFile
from fedtune.techniques._codecs.page_cipher import PageCipher
from fedtune.techniques.compressed._offloaded_blocks import StorageKeeper, attach_keeper
from tests.families import FAMILIES
from tests.technique_steps import chosen, gradients

PLENTY = 1 << 30


def a_file(max_bytes: int = PLENTY, *, encrypted: bool = False) -> ActivationFile:
    return ActivationFile(None, encrypted, max_bytes)


def step(family: str, joined: str, rows: int = 4, **settings: Any) -> tuple[dict[str, Tensor], int, nn.Module]:
    model, units = FAMILIES[family].model(), chosen(joined, **settings)
    batch = FAMILIES[family].make_batch(rows=rows, length=32)
    techniques.apply_techniques(units, model, FAMILIES[family].task, 0)
    techniques.begin_step(units, model, batch, 0.0)
    return *gradients(model, batch), model


def written(model: nn.Module) -> int:
    return int(vars(model)["offload"].file.written_bytes)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_bit_equal_and_what_was_written_is_no_longer_kept(family: str, encrypted: bool) -> None:
    wanted, plain, _ = step(family, "full")
    found, kept, model = step(family, "offload+full", min_bytes=1, blocks_in_memory=0, encrypted=encrypted)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert plain - written(model) <= kept < 0.7 * plain
    assert written(model) > 0.3 * plain


def test_the_last_blocks_and_small_activations_stay_in_memory() -> None:
    bytes_written = [
        written(step("bert", "offload+full", min_bytes=1, blocks_in_memory=count)[2]) for count in range(4)
    ]
    assert bytes_written[0] > bytes_written[1] > bytes_written[2] == bytes_written[3] == 0
    assert written(step("bert", "offload+full", min_bytes=PLENTY)[2]) == 0


def test_each_storage_is_written_once_and_weights_never() -> None:
    block, keeper = nn.Linear(64, 64), StorageKeeper(a_file(), 1)
    attach_keeper(block.train(), keeper)
    keeper.weights = frozenset(one.untyped_storage()._cdata for one in block.parameters())
    x = torch.randn(8, 10, 64)
    block(x).sum().backward()
    assert keeper.file.written_bytes == x.numel() * 4

    class Thrice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (x * x).sum() + x.t().exp().sum() + (x[1:] ** 2).sum() + x.view(2, -1).sin().sum()
            return out

    attach_keeper(layer := Thrice().train(), keeper)
    keeper.file.begin_count()
    x = torch.randn(8, 64, requires_grad=True)
    layer(x).backward()
    assert keeper.file.written_bytes == 2 * 8 * 64 * 4  # x, and the result of exp
    wanted = 2 * x + x.exp() + x.cos()
    wanted[1:] += 2 * x[1:]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted.detach())


class Odd(nn.Module):
    """Saves views, integers, masks, empty and expanded tensors."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        index = torch.argsort(x, -1)
        wide = x[:, :1].expand(-1, x.shape[1])
        empty = x[:0].exp().sum()
        parts = x.unflatten(1, (2, -1)).transpose(0, 1)
        other = torch.where(mask, x * x.detach().flip(0), x.sin()).gather(1, index)
        dropped = F.dropout(other, 0.5)
        out: Tensor = (dropped * wide).sum() + empty + (parts[0].T @ parts[1]).pow(2).sum() + x.median()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 10), (1, 2), (7, 14)])
def test_odd_saved_tensors_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    found = []
    for keeps in (False, True):
        layer, keeper = Odd().train(), StorageKeeper(a_file(), 1)
        if keeps:
            attach_keeper(layer, keeper)
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[0, 0] = float("nan")
        x[0, 1] = float("inf")
        x.requires_grad_()
        torch.manual_seed(1)
        layer(x).backward()
        assert x.grad is not None
        found.append(x.grad)
        assert bool(keeper.file.written_bytes) == keeps
    assert torch.equal(*(one.nan_to_num(1.5) for one in found))


def test_a_tensor_changed_after_it_was_written_has_the_gradient_of_then() -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.0
            first = (y.detach() * x).sum()
            y.detach().mul_(3)
            return first + (y.detach() * x).sum()

    attach_keeper(layer := Changing().train(), StorageKeeper(a_file(), 1))
    x = torch.randn(5, 7, requires_grad=True)
    layer(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 4 * x.detach())


def test_space_is_used_again_once_backward_has_read_it() -> None:
    block, keeper = nn.Linear(64, 64).train(), StorageKeeper(a_file(), 1)
    attach_keeper(block, keeper)
    for _ in range(3):
        block(torch.randn(8, 64)).sum().backward()
        file: Any = keeper.file._file
        assert os.fstat(file.fileno()).st_size == 0
        assert os.fstat(file.fileno()).st_nlink == 0  # no name
    block(torch.randn(8, 64))  # a forward pass without backward leaves nothing either
    assert os.fstat(file.fileno()).st_size == 0


def test_at_the_bound_activations_stay_in_memory_with_one_warning_until_the_next_round() -> None:
    wanted, _, _ = step("bert", "full")
    with pytest.warns(FedtuneWarning, match="max_gib_per_round is reached; activations stay in memory") as told:
        found, _, model = step("bert", "offload+full", min_bytes=1, max_gib_per_round=20000 / (1 << 30))
    assert len(told) == 1
    assert 0 < written(model) <= 20000
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    techniques.begin_round(chosen("offload+full", min_bytes=1), model, 2)
    assert written(model) == 0


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that takes three writes. The list grows with each."""
    real = os.pwrite
    calls: list[int] = []

    def write(descriptor: int, content: Any, offset: int) -> int:
        calls.append(len(content))
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content[: max(1, len(content) // 2)], offset)  # the system may write less

    monkeypatch.setattr(os, "pwrite", write)
    return calls


def test_on_a_full_disk_activations_stay_in_memory(full_disk: list[int]) -> None:
    wanted, _, _ = step("bert", "full")
    with pytest.warns(FedtuneWarning, match=r"cannot be written \(No space left on device\)"):
        found, _, _ = step("bert", "offload+full", min_bytes=1)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(full_disk) == 4


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.warns(FedtuneWarning, match="No such file or directory"):
        step("bert", "offload+full", min_bytes=1, folder="/nowhere/at/all")


def test_a_file_that_was_cut_short_is_an_error_not_a_wrong_gradient() -> None:
    file = a_file()
    slot = file.write(torch.arange(100, dtype=torch.uint8))
    assert slot is not None
    os.ftruncate(file._get_descriptor(), 50)
    with pytest.raises(RuntimeError, match="ends before byte 100"):
        file.read(slot)


def test_nothing_readable_is_on_the_disk_if_it_is_encrypted() -> None:
    content = torch.frombuffer(bytearray(b"a private sentence" * 50), dtype=torch.uint8)
    found = []
    for encrypted in (False, True):
        file = a_file(encrypted=encrypted)
        slots = [file.write(content) for _ in range(2)]
        raw = os.pread(file._get_descriptor(), 1800, 0)
        found.append(b"private" in raw)
        assert (raw[:900] == raw[900:]) is not encrypted  # no key stream is used twice
        assert all(slot is not None and torch.equal(file.read(slot), content) for slot in slots)
    assert found == [True, False]


def test_the_cipher_is_its_own_inverse_for_each_page() -> None:
    cipher = PageCipher()
    page = cipher.apply(b"0123456789abcdefXYZ", 7)
    assert cipher.apply(page, 7) == b"0123456789abcdefXYZ"
    assert cipher.apply(page, 8) != b"0123456789abcdefXYZ"
    assert PageCipher().apply(page, 7) != b"0123456789abcdefXYZ"


def test_copies_have_files_of_their_own() -> None:
    file = a_file(5000)
    file.write(torch.zeros(10, dtype=torch.uint8))
    for other in (pickle.loads(pickle.dumps(file)), copy.deepcopy(file)):
        assert (other.max_bytes, other.written_bytes, other._file) == (5000, 0, None)


def _write_in_child(file: ActivationFile) -> None:
    slot = file.write(torch.full((100,), 9, dtype=torch.uint8))
    assert slot is not None
    assert torch.equal(file.read(slot), torch.full((100,), 9, dtype=torch.uint8))
    file.release(slot)
    os._exit(0)


def test_a_forked_process_does_not_write_into_its_parents_file() -> None:
    file, content = a_file(), torch.arange(100, dtype=torch.uint8)
    slot = file.write(content)
    assert slot is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=_write_in_child, args=(file,))
        child.start()
    child.join()
    assert child.exitcode == 0
    assert torch.equal(file.read(slot), content)


def test_an_error_inside_a_block_leaves_no_hooks_behind() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    keeper = StorageKeeper(a_file(), 1)
    attach_keeper(layer := Failing().train(), keeper)
    with pytest.raises(ValueError, match="no"):
        layer(torch.zeros(3))
    x = torch.ones(500, requires_grad=True)
    (x * x.detach()).sum().backward()
    assert keeper.file.written_bytes == 0


def test_scoring_writes_nothing_and_folding_leaves_nothing() -> None:
    _, _, model = step("bert", "offload+full", min_bytes=1)
    vars(model)["offload"].file.begin_count()
    model.eval()
    batch = FAMILIES["bert"].make_batch()
    before = model(**batch).logits
    assert written(model) == 0
    for technique in chosen("offload+full"):
        technique.merge_into_weights(model)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert torch.equal(model(**batch).logits, before)


def test_a_model_without_blocks_and_recomputed_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no list of blocks; leave the technique offload out"):
        chosen("offload+full")[0].rewrite_model(nn.Linear(2, 2), FAMILIES["bert"].task, 0)
    with pytest.raises(RecipeError, match="could be written to a file; drop one"):
        chosen("offload+gradient-checkpointing+full")


def test_memory_of_a_step_falls_by_what_was_written() -> None:
    plain, offloaded = (step("llama", joined, rows=8, **own) for joined, own in _PEAKS)
    assert plain[1] - offloaded[1] == pytest.approx(written(offloaded[2]), rel=0.02)


_PEAKS: tuple[tuple[str, dict[str, Any]], ...] = (("full", {}), ("offload+full", {"min_bytes": 4096}))
