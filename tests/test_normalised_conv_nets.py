"""Nets whose batch norms are gone, and folded again."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.models.efficientnet_lite import EfficientNetLite
from fedtune.models.resnet import ResNet18
from fedtune.techniques.pruning._standardised_conv2d import (
    ConvNormPair,
    find_conv_norm_pairs,
    iter_standardised_conv2d,
    restore_batch_norms,
)
from tests.normalised_nets import Net, a_mask, drawn, gradients, made_normal
from tests.tiny import bert


class Alone(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


def test_norms_are_found_where_they_read_a_convolution_and_relus_before_it() -> None:
    assert find_conv_norm_pairs(Net()) == [ConvNormPair("stem", "norm", False), ConvNormPair("deep", "deep_norm", True)]
    resnet = find_conv_norm_pairs(ResNet18(3))
    assert len(resnet) == 20
    assert [pair.convolution for pair in resnet if not pair.after_relu] == ["conv1"]
    lite = find_conv_norm_pairs(EfficientNetLite(3))
    assert len(lite) == 49
    linear = {pair.convolution.rpartition(".")[2] for pair in lite if not pair.after_relu}
    assert linear == {"_conv_stem", "_expand_conv", "_conv_head"}


def test_a_model_without_such_pairs_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be tried out on a picture"):
        find_conv_norm_pairs(bert())
    with pytest.raises(
        ModelError, match=r"^Alone has no batch norm behind a convolution; leave standardise_weights out$"
    ):
        find_conv_norm_pairs(Alone())


def test_names_stay_but_for_the_norms_and_the_model_pickles() -> None:
    plain, model = Net(), Net()
    made_normal(model)
    gone = {name for name in plain.state_dict() if name.startswith(("norm.", "deep_norm."))}
    assert set(model.state_dict()) == set(plain.state_dict()) - gone | {"stem.gain", "deep.gain"}
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = drawn(2, 3, 16, 16)
        found, wanted = gradients(other, x), gradients(model, x)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for _, layer in iter_standardised_conv2d(other):
            assert vars(layer)["forward"].args[0] is layer


@pytest.mark.parametrize("masked", [False, True])
def test_folded_it_is_a_plain_net_of_the_same_names_and_function(masked: bool) -> None:
    model = Net().eval()
    names = set(model.state_dict())
    made_normal(model)
    for _, layer in iter_standardised_conv2d(model):
        layer.weight.data += 0.2
        if masked:
            layer.register_buffer("mask", a_mask(*layer.weight.shape))
    x = drawn(2, 3, 16, 16)
    wanted = model(x)
    restore_batch_norms(model)
    assert set(model.state_dict()) == names
    assert type(model.norm) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), wanted)
