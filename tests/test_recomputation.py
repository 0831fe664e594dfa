"""Checkpointed calls: the bits of torch's own, and of a step that keeps everything."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedtune.memory import StorageMeter
from fedtune.models import image_model_files
from fedtune.models.recomputation import recompute_in_backward
from fedtune.models.resnet import ResNet18
from fedtune.techniques._implicit_gradients import compute_input_gradients

Way = Callable[..., Any]
PLAIN: Way = lambda run, *inputs: run(*inputs)  # noqa: E731
TORCH: Way = partial(checkpoint, use_reentrant=False)


class Block(nn.Module):
    """Two layers with dropout; ``way`` runs the second one, so that calls nest."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.way = nn.Linear(6, 12), nn.Linear(12, 6), nn.LayerNorm(6), way

    def forward(self, x: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = F.dropout(F.gelu(self.one(self.norm(x))), 0.3)
        out = x + scale * self.way(lambda one: F.dropout(self.two(one).tanh(), 0.2), hidden)
        return (out if mask is None else out * mask), hidden.mean()


def run_step(way: Way, frozen: bool = False, autocast: bool = False) -> tuple[list[Tensor], Tensor]:
    """Return the loss and all gradients of three blocks, and the state of the generator afterwards."""
    torch.manual_seed(3)
    blocks = nn.ModuleList(Block(way) for _ in range(3))
    x, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.5
    blocks[0].requires_grad_(not frozen)
    means = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for place, block in enumerate(blocks):
            x, mean = way(block, x, 0.5, mask if place == 1 else None)
            means.append(mean)
        loss = x.float().square().mean() + sum(means)
    loss.backward()
    found = [parameter.grad for parameter in blocks.parameters() if parameter.requires_grad]
    return [loss.detach(), *(one for one in found if one is not None)], torch.get_rng_state()


@pytest.mark.parametrize(("frozen", "autocast"), [(False, False), (True, False), (False, True)])
def test_a_step_has_the_bits_of_torchs_and_of_one_that_keeps_everything(frozen: bool, autocast: bool) -> None:
    ours, state = run_step(recompute_in_backward, frozen, autocast)
    for way in (PLAIN, TORCH):
        theirs, their_state = run_step(way, frozen, autocast)
        assert len(ours) == len(theirs) == 1 + 6 * (3 - frozen)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert torch.equal(state, their_state)


def kept_bytes(way: Way) -> int:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 8))
    with StorageMeter(excluded=list(wide.parameters())) as meter:
        x = torch.randn(16, 8, requires_grad=True)
        for _ in range(4):
            x = way(lambda one: way(wide, one) + one, x)
        loss = x.sum()
        kept = meter.current_bytes
        loss.backward()
    return kept


def test_only_the_inputs_are_kept_and_as_much_as_torchs_keeps() -> None:
    assert kept_bytes(recompute_in_backward) == kept_bytes(TORCH)
    assert kept_bytes(recompute_in_backward) < 6 * 16 * 8 * 4
    assert kept_bytes(PLAIN) > 4 * 16 * 512 * 4


def test_nothing_is_kept_or_repeated_without_gradients() -> None:
    calls: list[int] = []
    with torch.no_grad():
        recompute_in_backward(calls.append, 1)
    assert calls == [1]


def test_nothing_is_left_of_a_call_after_its_backward_pass() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    inside = list[weakref.ref[Tensor]]()

    def run(one: Tensor) -> Tensor:
        hidden: Tensor = layer(one).tanh()
        inside.append(weakref.ref(hidden))
        return hidden.exp()

    gc.disable()
    try:
        recompute_in_backward(run, x * 2).sum().backward()
        assert [one() for one in inside] == [None, None]
    finally:
        gc.enable()


def test_tensors_without_data_and_hooks_around_a_call_are_as_without_it() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    recompute_in_backward(layer, x).sum().backward()
    assert layer.weight.grad is not None
    y, packed = torch.randn(2, 4, requires_grad=True), list[Tensor]()

    def pack(one: Tensor) -> Tensor:
        packed.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        out = recompute_in_backward(lambda one: one.exp().exp(), y)
    out.sum().backward()
    assert [one.data_ptr() for one in packed] == [y.data_ptr()]
    torch.testing.assert_close(y.grad, y.exp().exp() * y.exp())


def test_a_second_backward_pass_runs_the_call_again() -> None:
    weight, calls = torch.ones(3, requires_grad=True), list[int]()

    def run(x: Tensor) -> Tensor:
        calls.append(1)
        return (weight * x).exp().sum()

    loss = recompute_in_backward(run, torch.ones(3))
    loss.backward(retain_graph=True)
    first = weight.grad
    assert first is not None
    once = first.clone()
    loss.backward()
    assert torch.equal(first, 2 * once)
    assert len(calls) == 3


def test_a_call_that_is_another_the_second_time_is_refused() -> None:
    weight, layers = torch.ones(3, requires_grad=True), [torch.exp, torch.exp]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x * weight)
        layers.pop()
        return x.sum()

    with pytest.raises(RuntimeError, match="must not depend on state"):
        recompute_in_backward(run, torch.ones(3)).backward()


def test_an_error_of_the_second_run_is_told_and_one_of_the_model_cannot_hide_the_end() -> None:
    weight = torch.ones(3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        try:
            return (x * weight).exp()
        except Exception:
            return x * 0

    recompute_in_backward(run, torch.ones(3)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3).exp())


def test_gradients_from_given_ones_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    x, weight, unused = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    outs = [(x @ weight).relu(), (x * weight).sum(0), x]
    by = [torch.randn_like(one) for one in outs]
    theirs = torch.autograd.grad(outs, [x, weight, unused], by, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        ours = compute_input_gradients(outs, [x, weight, unused], by)
    assert ours[2] is None
    assert all(one is not None and torch.equal(one, other) for one, other in zip(ours[:2], theirs[:2], strict=True))


HEAVY = ("torch._dynamo", "sympy", "scipy", "sklearn", "transformers", "peft", "datasets", "pyarrow", "pandas", "flwr")
RECIPE = """
version: 2
name: tiny
task: image-classification
model: {source: "path:FOLDER"}
data: {source: random}
devices: [{count: 1}]
train: {local_steps: 1, batch_size: 2, image_size: 28, techniques: [full, gradient-checkpointing]}
federation: {rounds: 1}
"""
SCRIPT = f"""
import sys
import fedtune.device.trainer
from fedtune.profiling.measure_step import profile_step
from fedtune.techniques._implicit_gradients import compute_input_gradients
from fedtune.profiling import ProfileCase
from fedtune.recipe.yaml_file import parse_recipe
import torch

x = torch.ones(2, requires_grad=True)
compute_input_gradients([x * 2], [x], [torch.ones(2)])
case = ProfileCase("case", parse_recipe(sys.argv[1], "tiny", ()).model_dump_json(), ("a", "b"), None)
print(profile_step(case).kept_bytes, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def test_a_trainer_of_an_image_model_imports_no_compiler_and_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    image_model_files.save_image_model(ResNet18(2, small=True, width=4), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, RECIPE.replace("FOLDER", str(tmp_path))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout
