"""Layers that store their input pruned, beside the dense ones."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedtune.memory import StorageMeter
from fedtune.techniques.pruning._pruned_input_layers import InputStorage, RecentInputs, attach_input_pruning
from fedtune.techniques.pruning._pruned_tensor import PruningRule, pack_pruned, unpack_pruned
from tests.pruned_layers import CASES, CONVOLUTIONS, drawn, made, noting, step, told


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_keeps_everything_is_the_dense_one_to_the_bit(name: str) -> None:
    build, shape = CASES[name]
    dense, pruned = made(build), told(made(build), 0.0)
    out, wanted = step(dense, drawn(*shape))
    found_out, found = step(pruned, drawn(*shape))
    assert torch.equal(found_out, out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[one], wanted[one]) for one in wanted)


@pytest.mark.parametrize("prune", [0.5, 0.9])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_output_input_gradient_and_bias_gradient_are_those_of_the_dense_layer(
    name: str, rows: bool, prune: float
) -> None:
    build, shape = CASES[name]
    dense, pruned = made(build), told(made(build), prune, rows=rows)
    out, wanted = step(dense, drawn(*shape))
    found_out, found = step(pruned, drawn(*shape))
    assert torch.equal(found_out, out)
    assert all(torch.equal(found[one], wanted[one]) for one in wanted if one != "weight")
    assert not torch.equal(found["weight"], wanted["weight"])


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_weight_gradient_is_that_of_the_dense_layer_fed_the_pruned_input(name: str, rows: bool) -> None:
    build, shape = CASES[name]
    dense, pruned = made(build).double(), told(made(build).double(), 0.7, rows=rows)
    x = drawn(*shape).double()
    row = x.shape[-1] if isinstance(dense, nn.Linear) else x[0].numel()
    x_hat = unpack_pruned(*pack_pruned(x, PruningRule(0.7), row if rows else x.numel()))
    wanted = step(dense, x_hat)[1]["weight"]
    found = step(pruned, x)[1]["weight"]
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_centring_is_exact_in_the_mean_part() -> None:
    """dW = g^T x_hat + (sum of g)^T c, with x_hat the pruned x - c."""
    pruned = told(made(lambda: nn.Linear(8, 5)).double(), 0.5, rows=True, centre=True)
    x, g = drawn(6, 8).double() + 3, drawn(6, 5, seed=1).double()
    c = x.mean(0)
    x_hat = unpack_pruned(*pack_pruned(x - c, PruningRule(0.5), 8))
    found = step(pruned, x, g)[1]["weight"]
    torch.testing.assert_close(found, g.T @ x_hat + torch.outer(g.sum(0), c), rtol=1e-12, atol=1e-12)


def test_rows_of_a_convolution_are_pictures() -> None:
    loud = torch.cat([drawn(1, 4, 9, 8), 100 * drawn(1, 4, 9, 8, seed=1)])
    kept: dict[bool, list[Tensor]] = {}
    for rows in (False, True):
        layer = told(made(CONVOLUTIONS["plain"]), 0.5, rows=rows)
        packed, _ = vars(layer)["forward"].args[1].pack(loud, loud[0].numel())
        kept[rows] = [packed[0][packed[0].abs() < 5]]
    assert len(kept[True][0]) > 0.9 * 144 > 10 * len(kept[False][0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("half", [False, True])
def test_saved_bytes_are_those_of_the_formula_by_both_ways_to_count(name: str, half: bool) -> None:
    build, shape = CASES[name]
    layer = told(made(build), 0.5, half=half)
    x = drawn(*shape).requires_grad_()
    saved: list[Tensor] = []
    excluded = [*layer.parameters(), x]
    with StorageMeter(excluded=excluded) as meter, saved_tensors_hooks(noting(saved), lambda t: t):
        out = layer(x)
        made_bytes = meter.current_bytes - out.untyped_storage().nbytes()
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    hooked = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    n = x.numel()
    formula = n // 2 * (2 if half else 4) + (-(-n // 8) if n > 8 else 1)
    assert sum(size for key, size in hooked.items() if key not in parameters) == formula
    assert made_bytes == formula


@pytest.mark.parametrize("name", ["plain", "same 3", "tokens"])
def test_the_dense_input_is_gone_before_the_backward_pass(name: str) -> None:
    build, shape = CASES[name]
    layer = told(made(build), 0.5)
    leaf = drawn(*shape).requires_grad_()
    x = leaf * 2
    storage = weakref.ref(x.untyped_storage())
    tensor = weakref.ref(x)
    out = layer(x)
    del x
    gc.collect()
    assert tensor() is None
    assert storage() is None
    out.sum().backward()
    assert leaf.grad is not None


def test_nothing_is_kept_on_the_node_but_what_autograd_sees() -> None:
    for name in ("plain", "tokens"):
        build, shape = CASES[name]
        out = told(made(build), 0.5)(drawn(*shape).requires_grad_())
        held = [value for value in vars(out.grad_fn).values() if isinstance(value, Tensor)]
        assert not held


def test_no_pruning_without_gradients_in_scoring_or_for_a_frozen_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("pruned")

    monkeypatch.setattr(RecentInputs, "pack", refuse)
    for name, (build, shape) in CASES.items():
        layer = told(made(build), 0.5)
        with torch.no_grad():
            layer(drawn(*shape))
        layer.eval()
        out, wanted = step(layer, drawn(*shape))
        dense = step(made(build), drawn(*shape))
        assert torch.equal(out, dense[0]), name
        assert all(torch.equal(wanted[one], dense[1][one]) for one in wanted), name
        layer.train().requires_grad_(False)
        layer(drawn(*shape).requires_grad_()).sum().backward()


@pytest.mark.parametrize("name", ["strided", "depthwise", "same 3", "tokens"])
def test_a_frozen_layer_keeps_nothing_and_passes_the_gradient_to_the_bit(name: str) -> None:
    build, shape = CASES[name]
    dense, frozen = made(build), told(made(build), 0.5)
    frozen.requires_grad_(False)
    x = drawn(*shape).requires_grad_()
    with StorageMeter(excluded=[*frozen.parameters(), x]) as meter:
        out = frozen(x)
        assert meter.current_bytes == out.untyped_storage().nbytes()
    assert torch.equal(step(frozen, drawn(*shape))[1]["input"], step(dense, drawn(*shape))[1]["input"])


def test_a_channels_last_map_gives_the_bits_of_the_dense_layer() -> None:
    x = drawn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    dense, pruned = made(CONVOLUTIONS["plain"]), told(made(CONVOLUTIONS["plain"]), 0.5)
    out, wanted = step(dense, x)
    found_out, found = step(pruned, x)
    assert torch.equal(found_out, out)
    assert all(torch.equal(found[one], wanted[one]) for one in wanted if one != "weight")


def test_layers_it_does_not_know_are_left_alone() -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    strange = nn.ModuleList(
        [Other(3, 3), nn.Conv2d(3, 3, 3, padding_mode="reflect"), nn.Conv2d(3, 3, 3, padding="same")]
    )
    latest = RecentInputs()
    keeping = InputStorage(PruningRule(0.5), False, latest)
    assert attach_input_pruning(strange, keeping, keeping) == 0
    assert all("forward" not in vars(layer) for layer in strange)
