"""What the image models defined here have in common, and how untrained ones are drawn."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtune import models
from fedtune.memory import StorageMeter
from fedtune.models.kinds import IMAGE_MODEL_CLASSES
from fedtune.models.logistic import LogisticRegression
from fedtune.models.mobilenet_v3 import SqueezeExcite
from fedtune.models.recomputation import recompute_in_backward
from fedtune.recipe.schema import ModelSettings
from tests.own_nets import net, pictures
from tests.technique_steps import IMAGES

TEN = tuple("0123456789")
UNTRAINED = ["mobilenet-v2", "mobilenet-v3-small", "resnet18", "resnet18-small", "resnet18-narrow"]

every_net = pytest.mark.parametrize("kind", IMAGE_MODEL_CLASSES)
every_deep_net = pytest.mark.parametrize(
    "kind", [kind for kind in IMAGE_MODEL_CLASSES if kind != LogisticRegression.kind]
)


def load(name: str, seed: int = 0) -> nn.Module:
    return models.load_model(ModelSettings(source=f"sample:{name}"), IMAGES, TEN, seed=seed)


@every_net
def test_stages_hold_every_parameter_and_buffer_once(kind: str) -> None:
    model = net(kind)
    stages = model.stages()
    held = [id(tensor) for stage in stages for tensor in (*stage.parameters(), *stage.buffers())]
    assert sorted(held) == sorted(id(tensor) for tensor in (*model.parameters(), *model.buffers()))


@every_net
def test_stages_one_after_the_other_give_the_logits(kind: str) -> None:
    model, x = net(kind), pictures()
    expected = model(x).logits
    for stage in model.stages():
        x = stage(x)
    assert torch.equal(x, expected)


class Seen(nn.Module):
    """Counts its calls and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@every_deep_net
def test_every_norm_and_every_activation_may_be_replaced_by_its_name(kind: str) -> None:
    model = net(kind)
    replaced: dict[str, Seen] = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.Hardswish | nn.Hardsigmoid):
            model.set_submodule(name, replaced.setdefault(name, Seen()))
    model(pictures())
    assert {name: seen.calls for name, seen in replaced.items()} == dict.fromkeys(replaced, 1)
    assert len(replaced) > 30


@every_deep_net
def test_a_net_without_the_norms_and_activations_it_shows_is_linear(kind: str) -> None:
    """Whether an activation hides in a forward pass."""
    model = net(kind).double()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.Hardswish | nn.MaxPool2d):
            model.set_submodule(name, nn.Identity())
        if isinstance(layer, SqueezeExcite):
            model.set_submodule(name, nn.Identity())
    x, y = pictures(1).double(), pictures(2)[1:].double()
    at_zero = model.logits(torch.zeros_like(x))
    torch.testing.assert_close(model.logits(x) + model.logits(y) - at_zero, model.logits(x + y))


@every_deep_net
def test_checkpointing_keeps_the_gradients_to_the_bit_and_fewer_bytes(kind: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = net(kind)
        if checkpointed:
            model.enable_checkpointing(recompute_in_backward)
        model.train()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        torch.manual_seed(2)
        with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
            loss = model(pictures(4), labels=torch.arange(4)).loss
            kept = meter.current_bytes
        loss.backward()
        found.append((kept, [parameter.grad for parameter in model.parameters()]))
    (plain_bytes, plain), (kept, again) = found
    assert all(
        one is not None and other is not None and torch.equal(one, other)
        for one, other in zip(plain, again, strict=True)
    )
    assert kept < plain_bytes / 4


@every_net
def test_a_net_survives_pickling_and_shared_memory(kind: str) -> None:
    model = net(kind)
    model.share_memory()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(pictures()).logits, model(pictures()).logits)


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_net_is_drawn_from_the_seed_alone(name: str) -> None:
    torch.manual_seed(3)
    first = load(name, seed=7).state_dict()
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
    again, other = load(name, seed=7).state_dict(), load(name, seed=8).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert all(not torch.equal(tensor, other[key]) for key, tensor in first.items() if tensor.ndim > 1)


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_net_is_drawn_as_he_and_others_wrote(name: str) -> None:
    for layer in load(name).modules():
        if isinstance(layer, nn.Conv2d):
            outputs_per_input = layer.out_channels // layer.groups * math.prod(layer.kernel_size)
            tolerance = 6 / (2 * layer.weight.numel()) ** 0.5
            assert layer.weight.std().item() == pytest.approx((2 / outputs_per_input) ** 0.5, rel=tolerance)
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and layer.bias is not None:
            assert (layer.bias == 0).all()


def test_a_checkpoint_with_another_number_of_labels_gives_all_but_the_last_layer(tmp_path: Path) -> None:
    trained = net("mobilenet-v3-small", 7)
    models.save_model(trained, "abcdefg", tmp_path / "saved")
    loaded = models.load_model(ModelSettings(source=f"path:{tmp_path / 'saved'}"), IMAGES, TEN, seed=1).state_dict()
    different = [name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, loaded[name])]
    assert different == ["classifier.3.weight", "classifier.3.bias"]


def test_the_small_stem_of_resnet18_keeps_the_size_of_the_picture() -> None:
    stem, *blocks, _ = net("resnet18", small=True).stages()
    maps = stem(pictures(side=28))
    assert maps.shape == (2, 64, 28, 28)
    assert nn.Sequential(*blocks)(maps).shape == (2, 512, 4, 4)
    assert load("resnet18-small").get_parameter("conv1.weight").shape == (64, 3, 3, 3)
    assert load("resnet18").get_parameter("conv1.weight").shape == (64, 3, 7, 7)
