"""A tensor that several layers read is stored once, for as long as it is needed."""

import pickle
import weakref
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.memory import StorageMeter
from fedtune.techniques.pruning._pruned_input_layers import RecentInputs, detach_input_pruning
from fedtune.techniques.pruning._pruned_tensor import PruningRule
from tests.pruned_layers import drawn, same, step, told


def test_layers_called_with_one_tensor_prune_it_once_and_share_what_is_stored() -> None:
    model = told(nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]), 0.5, rows=True)
    x = drawn(10, 64).requires_grad_()
    with StorageMeter(excluded=[*model.parameters(), x]) as meter:
        outs = [layer(x) for layer in model]
        kept = meter.current_bytes - sum(out.untyped_storage().nbytes() for out in outs)
    assert kept == 640 * 2 + 640 // 8


def test_a_shortcut_shares_what_the_first_layer_of_its_block_stored() -> None:
    first, second, shortcut = model = told(nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)]), 0.5)
    x = drawn(2, 4, 9, 8).requires_grad_()
    with StorageMeter(excluded=[*model.parameters(), x]) as meter:
        out = second(first(x).square()) + shortcut(x)
        kept = meter.current_bytes - 2 * x.numel() * 4  # the sum, and what the square keeps
    assert kept == 2 * (x.numel() // 2 * 4 + x.numel() // 8)
    assert out.requires_grad


def test_a_tensor_is_pruned_again_once_it_has_changed_or_another_takes_its_address() -> None:
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    dense: Any = deepcopy(model)
    told(model, 0.0, half=True)
    x = drawn(5, 8)
    model[0](x)
    x.mul_(2)
    for other in (x, drawn(5, 8, seed=3)):
        model[1](other).sum().backward()
        dense[1](other.half().float()).sum().backward()
        assert same(model[1].weight.grad, dense[1].weight.grad)
        model.zero_grad()
        dense.zero_grad()


def test_what_was_stored_last_is_let_go_with_its_tensor_or_on_demand() -> None:
    latest = RecentInputs()
    x = drawn(4, 8)
    packed = weakref.ref(latest.pack(x, PruningRule(0.5), 8).tensors[0])
    assert packed() is not None
    del x
    assert packed() is None
    x = drawn(4, 8)
    packed = weakref.ref(latest.pack(x, PruningRule(0.5), 8).tensors[0])
    latest.clear()
    assert packed() is None


def test_a_layer_that_runs_again_in_the_backward_pass_gives_the_same_bits() -> None:
    model = told(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)), 0.5)
    _, wanted = step(model, drawn(2, 4, 9, 8))
    model.zero_grad()
    x = drawn(2, 4, 9, 8).requires_grad_()
    out = checkpoint(model, x, use_reentrant=False)
    out.backward(drawn(*out.shape, seed=9))
    assert same(x.grad, wanted["input"])
    assert all(same(p.grad, wanted[name]) for name, p in model.named_parameters())


def test_told_layers_survive_pickling_and_copying_and_forget_on_demand() -> None:
    model = told(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), 0.5, rows=True)
    x = drawn(5, 8)
    _, wanted = step(model, x)
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(other[0])["forward"].args[0] is other[0]
        assert vars(other[0])["forward"].args[1].latest is vars(other[2])["forward"].args[1].latest
        _, found = step(other, x)
        assert all(torch.equal(found[one], wanted[one]) for one in wanted)
    detach_input_pruning(model)
    assert all("forward" not in vars(layer) for layer in model)
