"""Gradients against autograd's, taken from a net that no technique has touched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.techniques.mobile._inverted_residual import find_inverted_residuals
from fedtune.training import set_train_mode
from tests.mobile_nets import SmallNet, age, gradients, hard_net, in_transformers, pictures, switched_on
from tests.own_nets import net
from tests.technique_steps import IMAGES, chosen, shake, shared

BUILDS: dict[str, Callable[[], Any]] = {
    "small": SmallNet,
    "lite0": lambda: net("efficientnet-lite", 3),
    "v2": lambda: net("mobilenet-v2", 3),
    "transformers": in_transformers,
}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert found.keys() == wanted.keys()
    assert all(bool(gradient.any()) for gradient in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


@pytest.mark.parametrize(
    ("technique", "settings"),
    [
        ("mobiletl", {"last_norm": "frozen"}),
        ("mobiletl", {"last_norm": "frozen", "blocks": 5, "head": "freeze", "micro_batch": 4}),
        ("batch-norm", {}),
        ("bias", {}),
    ],
)
@pytest.mark.parametrize("kind", BUILDS)
def test_gradients_are_those_of_the_untouched_net(kind: str, technique: str, settings: dict[str, Any]) -> None:
    model, plain = age(BUILDS[kind]()).double(), age(BUILDS[kind]()).double()
    names = shared(technique, model, IMAGES, **settings)
    batch = pictures(dtype=torch.float64)
    found, wanted = gradients(model, batch), gradients(switched_on(plain, names), batch)
    assert sorted(found) == names
    assert furthest(found, wanted) <= 1e-12


def with_last_norms_in_training(plain: nn.Module) -> list[nn.BatchNorm2d]:
    last = [plain.get_submodule(block.last_norm) for block in find_inverted_residuals(plain)[-2:]]
    return [norm.train() for norm in last if isinstance(norm, nn.BatchNorm2d)]


def test_last_norms_that_learn_their_statistics_follow_the_untouched_net_for_three_steps() -> None:
    model, plain = age(SmallNet()).double(), age(SmallNet()).double()
    names = shared("mobiletl", model, IMAGES, blocks=2)
    switched_on(plain, names)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_train_mode(model)
    norms = with_last_norms_in_training(plain)
    for step in range(3):
        batch = pictures(8, side=64, seed=step, dtype=torch.float64)
        found, wanted = gradients(model, batch), gradients(plain, batch)
        assert furthest(found, wanted) <= 1e-12
        for one, grads in ((model, found), (plain, wanted)):
            for name, parameter in one.named_parameters():
                if name in grads:
                    parameter.data -= 0.01 * grads[name]
    after, other = model.state_dict(), plain.state_dict()
    assert len(norms) == 2
    for name in names:
        assert not torch.equal(after[name], before[name]), name
        torch.testing.assert_close(after[name], other[name], rtol=1e-12, atol=1e-12)
    for name in after.keys() - set(names):
        assert torch.equal(after[name], before[name]), name


def test_a_batch_too_small_for_statistics_takes_the_running_ones_and_leaves_them() -> None:
    model, plain = age(SmallNet()).double(), age(SmallNet()).double()
    names = shared("mobiletl", model, IMAGES, blocks=2)
    set_train_mode(model)
    batch = pictures(1, dtype=torch.float64)
    before = model.state_dict()["blocks.4._bn2.running_var"].clone()
    assert furthest(gradients(model, batch), gradients(switched_on(plain, names), batch)) <= 1e-12
    assert torch.equal(model.state_dict()["blocks.4._bn2.running_var"], before)


class Signed(torch.autograd.Function):
    """A function with MobileTL's backward pass, as it is written down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [x] = ctx.saved_tensors
        by_x: Tensor = gradients[0] * (x >= 0)
        return by_x, None


class SignedActivation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Signed.apply(x, self.function)
        return out


def hard_swish(x: Tensor) -> Tensor:
    return x * torch.clamp(x + 3, 0, 6) / 6


def relu6(x: Tensor) -> Tensor:
    return torch.clamp(x, 0, 6)


@pytest.mark.parametrize(
    ("build", "kind", "function", "mask"),
    [(hard_net, nn.Hardswish, hard_swish, "exact"), (SmallNet, nn.ReLU6, relu6, "paper")],
)
def test_the_papers_masks_are_the_published_approximation_and_nothing_else_differs(
    build: Callable[[], Any], kind: type[nn.Module], function: Callable[[Tensor], Tensor], mask: str
) -> None:
    model, slow, untouched = (age(build()).double() for _ in range(3))
    names = shared("mobiletl", model, IMAGES, last_norm="frozen", mask=mask)
    for name, layer in list(slow.named_modules()):
        if isinstance(layer, kind):
            slow.set_submodule(name, SignedActivation(function))
    batch = pictures(dtype=torch.float64)
    found = gradients(model, batch)
    assert furthest(found, gradients(switched_on(slow, names), batch)) <= 1e-12
    assert furthest(found, gradients(switched_on(untouched, names), batch)) > 0.01


def test_hard_swish_is_exact_if_asked_for() -> None:
    model, plain = age(hard_net()).double(), age(hard_net()).double()
    names = shared("mobiletl", model, IMAGES, last_norm="frozen", hard_swish="exact")
    batch = pictures(dtype=torch.float64)
    assert furthest(gradients(model, batch), gradients(switched_on(plain, names), batch)) <= 1e-12


@pytest.mark.parametrize("technique", ["mobiletl", "last-blocks", "batch-norm", "bias", "tinytl"])
@pytest.mark.parametrize("build", [SmallNet, in_transformers])
def test_the_twin_with_stored_activations_has_the_same_gradients_to_the_bit(
    build: Callable[[], Any], technique: str
) -> None:
    """In micro-batches the frozen part would differ by rounding."""
    [one] = chosen(technique, **({"micro_batch": 8} if technique == "mobiletl" else {}))
    found = []
    for made in (one, one.make_reference()):
        assert made is not None
        model = age(build())
        names = techniques.apply_techniques([made], model, IMAGES, 0)
        shake(model, [name for name in names if "running" not in name])
        set_train_mode(model)
        found.append(gradients(model, pictures(8, side=64)))
        assert sorted(found[-1]) == [name for name in names if "running" not in name]
    assert furthest(*found) == 0
