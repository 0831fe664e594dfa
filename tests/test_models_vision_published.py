"""The image models against their papers, torchvision's checkpoints and the same nets in transformers."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from fedtune.models.classifier import ImageClassifier
from fedtune.models.mobilenet_v2 import MobileNetV2
from fedtune.models.mobilenet_v3 import MobileNetV3, SqueezeExcite, V3Block
from fedtune.models.resnet import ResNet18
from tests.own_nets import net, pictures

LABELS: dict[str, Any] = {"num_labels": 10}
PUBLISHED: dict[type[ImageClassifier], tuple[int, float]] = {
    MobileNetV2: (3_504_872, 300e6),
    MobileNetV3: (2_542_856, 56e6),
    ResNet18: (11_689_512, 1.8e9),
}
"""Parameters of torchvision's checkpoints; multiply-adds at 224 pixels as the papers' tables have them."""


def multiply_adds(model: nn.Module, side: int) -> int:
    """Of convolutions and linear layers, for one picture."""
    found: list[int] = []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        found.append(layer.weight[0].numel() * out[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(pictures(1, side))
    return sum(found)


@pytest.mark.parametrize("made", PUBLISHED)
def test_a_net_has_the_published_number_of_parameters_and_of_multiply_adds(made: type[ImageClassifier]) -> None:
    model = net(made.kind, 1000)
    parameters, published = PUBLISHED[made]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert multiply_adds(model, 224) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mobilenet-v2", "features.0.0 features.1.conv.0.0 features.1.conv.2 features.2.conv.3 features.18.1"),
        ("mobilenet-v3-small", "features.1.block.1.fc1 features.1.block.2.1 features.4.block.2.fc2 classifier.0"),
        ("resnet18", "conv1 bn1 layer1.0.bn2 layer2.0.downsample.0 layer2.0.downsample.1 layer4.1.conv2"),
    ],
)
def test_layers_bear_the_names_of_torchvisions(kind: str, names: str) -> None:
    tensors = net(kind).state_dict()
    assert {f"{name}.weight" for name in names.split()} <= tensors.keys()


def give(taken: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Load a state of other names, in the same order."""
    wanted = model.state_dict()
    assert [tensor.shape for tensor in taken.values()] == [tensor.shape for tensor in wanted.values()]
    model.load_state_dict(dict(zip(wanted, taken.values(), strict=True)))


def stir(model: nn.Module) -> None:
    """Give norms statistics and parameters of their own."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
            for tensor in (layer.bias.data, layer.running_mean):
                assert tensor is not None
                tensor.uniform_(-0.3, 0.3)


@pytest.mark.parametrize("side", [64, 65])
def test_mobilenet_v2_gives_the_logits_of_transformers(side: int) -> None:
    ours = net("mobilenet-v2")
    stir(ours)
    theirs = MobileNetV2ForImageClassification(
        MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, **LABELS)
    ).eval()
    give(ours.state_dict(), theirs)
    with torch.no_grad():
        expected = theirs(pictures(side=side)).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(pictures(side=side)).logits, expected, rtol=1e-4, atol=1e-4)


def resnet_name(theirs: str) -> str:
    """Ours of a tensor of transformers' ResNet."""
    name = theirs.replace("resnet.embedder.embedder.convolution", "conv1").replace("classifier.1", "fc")
    name = name.replace("resnet.embedder.embedder.normalization", "bn1")
    name = re.sub(r"resnet\.encoder\.stages\.(\d)\.layers", lambda found: f"layer{int(found[1]) + 1}", name)
    name = re.sub(r"layer\.(\d)\.convolution", lambda found: f"conv{int(found[1]) + 1}", name)
    name = re.sub(r"layer\.(\d)\.normalization", lambda found: f"bn{int(found[1]) + 1}", name)
    return name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")


@pytest.mark.parametrize("side", [64, 65])
def test_resnet18_gives_the_logits_of_transformers(side: int) -> None:
    ours = net("resnet18")
    stir(ours)
    widths = [64, 128, 256, 512]
    settings = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=widths, layer_type="basic", **LABELS)
    theirs = ResNetForImageClassification(settings).eval()
    tensors = ours.state_dict()
    theirs.load_state_dict({name: tensors[resnet_name(name)] for name in theirs.state_dict()})
    with torch.no_grad():
        expected = theirs(pictures(side=side)).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(pictures(side=side)).logits, expected, rtol=1e-4, atol=1e-4)


def test_squeeze_excite_weighs_each_channel_by_a_gate_from_the_means_of_all() -> None:
    torch.manual_seed(0)
    layer, maps = SqueezeExcite(72), torch.randn(3, 72, 5, 4)
    assert layer.fc1.bias is not None
    assert layer.fc2.bias is not None
    assert layer.fc1.out_channels == 24  # a quarter is 18, and 16 would be less than nine tenths of it
    means = maps.sum((2, 3)) / 20
    squeezed = (means @ layer.fc1.weight.flatten(1).T + layer.fc1.bias).clamp(min=0)
    gate = ((squeezed @ layer.fc2.weight.flatten(1).T + layer.fc2.bias) / 6 + 0.5).clamp(0, 1)
    assert gate.std() > 0.01
    torch.testing.assert_close(layer(maps), maps * gate[:, :, None, None])


def hard_swish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def readable_v3_block(
    block: V3Block, x: Tensor, kernel: int, stride: int, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """With squeeze-excite and widening, by the names of its tensors."""
    tensors = block.state_dict()

    def normalise(x: Tensor, place: int) -> Tensor:
        mean, variance, scale, shift = (
            tensors[f"block.{place}.1.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        normal: Tensor = (x - mean) / (variance + 1e-3).sqrt() * scale + shift
        return normal

    hidden = activation(normalise(F.conv2d(x, tensors["block.0.0.weight"]), 0))
    weight = tensors["block.1.0.weight"]
    spread = F.conv2d(hidden, weight, stride=stride, padding=kernel // 2, groups=len(weight))
    weighed = block.block[2](activation(normalise(spread, 1)))
    out = normalise(F.conv2d(weighed, tensors["block.3.0.weight"]), 3)
    return x + out if out.shape == x.shape else out


@pytest.mark.parametrize(("stride", "outputs"), [(1, 8), (1, 16), (2, 8)])
def test_a_v3_block_gives_what_its_readable_twin_gives(stride: int, outputs: int) -> None:
    torch.manual_seed(0)
    for made, activation in ((nn.Hardswish, hard_swish), (nn.ReLU, torch.relu)):
        block = V3Block(8, 32, outputs, 5, stride, made, squeezes=True).eval()
        stir(block)
        x = torch.randn(2, 8, 7, 9)
        torch.testing.assert_close(block(x), readable_v3_block(block, x, 5, stride, activation))


def test_the_norms_of_v3_are_the_published_ones_and_those_of_the_others_the_usual() -> None:
    constants = {
        kind: {(layer.eps, layer.momentum) for layer in net(kind).modules() if isinstance(layer, nn.BatchNorm2d)}
        for kind in ("mobilenet-v2", "mobilenet-v3-small", "resnet18")
    }
    usual = {(1e-5, 0.1)}
    assert constants == {"mobilenet-v2": usual, "mobilenet-v3-small": {(1e-3, 0.01)}, "resnet18": usual}


def test_v3_has_squeeze_excite_and_hard_swish_where_the_table_has_them() -> None:
    blocks = [block for block in net("mobilenet-v3-small").stages() if isinstance(block, V3Block)]
    gated = [any(isinstance(layer, SqueezeExcite) for layer in block.layers()) for block in blocks]
    swish = [any(isinstance(layer, nn.Hardswish) for layer in block.layers()) for block in blocks]
    assert gated == [True, False, False, *[True] * 8]
    assert swish == [*[False] * 3, *[True] * 8]
