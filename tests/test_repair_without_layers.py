"""RESET and bias calibration: what replaces averaged statistics, and what needs no data."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.errors import ModelError
from fedtune.merging import MergeContext
from fedtune.merging.renormalise.bias_calibration import BiasCalibration
from fedtune.merging.renormalise.reset import Reset
from tests.rebasin_models import batch_for, convolutional, drawn, mlp, pictures

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


def test_reset_collects_the_cumulative_average_layer_by_layer() -> None:
    net = drawn(convolutional("batch"))
    state, inputs = state_of(net), batch_for(net, 48)["input"]
    found = Reset().renormalise(
        state, [], MergeContext(model=net, calibration_batches=[{"input": part} for part in inputs.split(16)])
    )
    assert found.keys() == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    conv = nn.Sequential(*list(net)[:1])  # type: ignore[call-overload]
    with torch.no_grad():
        outputs = [conv(part) for part in inputs.split(16)]
    means = torch.stack([z.mean((0, 2, 3)) for z in outputs]).mean(0)
    variances = torch.stack([z.var((0, 2, 3)) for z in outputs]).mean(0)
    torch.testing.assert_close(found["1.running_mean"], means)
    torch.testing.assert_close(found["1.running_var"], variances)


def test_reset_leaves_the_architecture_as_it_was() -> None:
    net = drawn(convolutional("batch"))
    own, momenta = state_of(net), [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    Reset().renormalise(own, [], MergeContext(model=net, calibration_batches=[batch_for(net, 8)]))
    assert all(torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert not any(module.training for module in net.modules())


def test_reset_of_an_unmerged_net_reproduces_its_accuracy() -> None:
    torch.manual_seed(0)
    net, inputs = convolutional("batch"), pictures(600)
    labels = (inputs[:, 0].mean((1, 2)) > 0).long() + 2 * (inputs[:, 1].mean((1, 2)) > 0).long()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for rows in [rows for _ in range(30) for rows in torch.randperm(600).split(50)]:
        optimiser.zero_grad()
        F.cross_entropy(net(inputs[rows]), labels[rows]).backward()
        optimiser.step()
    with torch.no_grad():
        for rows in 5 * inputs.split(100):  # the running statistics catch up with the last step
            net(rows)
    net.eval()

    def accuracy() -> float:
        with torch.no_grad():
            return float((net(inputs).argmax(1) == labels).double().mean())

    before = accuracy()
    state = state_of(net)
    changed = Reset().renormalise(
        state, [], MergeContext(model=net, calibration_batches=[{"input": p} for p in inputs.split(100)])
    )
    net.load_state_dict(state | changed)
    assert before > 0.6
    assert accuracy() == pytest.approx(before, abs=0.003)
    net.load_state_dict(state | {name: 4 * tensor + 3 for name, tensor in changed.items()})
    assert accuracy() < before - 0.1


def test_reset_is_for_nets_with_running_statistics() -> None:
    with pytest.raises(ModelError, match="reset: Sequential has no batch norm with running statistics"):
        Reset().renormalise(
            {}, [], MergeContext(model=convolutional("layer"), calibration_batches=[{"input": pictures()}])
        )


def test_biases_fade_with_the_power_of_their_depth() -> None:
    one, two = (state_of(drawn(mlp(), seed)) for seed in (1, 2))
    found = BiasCalibration().renormalise(one, [(0.3, one), (0.7, two)], MergeContext(model=mlp()))
    assert found.keys() == {"0.bias", "2.bias", "4.bias"}
    for depth, name in enumerate(("0.bias", "2.bias", "4.bias"), start=1):
        torch.testing.assert_close(found[name], 0.3**depth * one[name] + 0.7**depth * two[name])


def test_one_model_alone_keeps_its_biases() -> None:
    one, two = (state_of(drawn(mlp(), seed)) for seed in (1, 2))
    found = BiasCalibration().renormalise(one, [(1.0, one), (0.0, two)], MergeContext(model=mlp()))
    assert all(torch.equal(tensor, one[name]) for name, tensor in found.items())


def test_nets_with_norms_and_no_model_are_refused() -> None:
    with pytest.raises(ModelError, match="bias-calibration: '1' normalises the values that it would shrink"):
        BiasCalibration().renormalise({}, [], MergeContext(model=convolutional("batch")))
    with pytest.raises(ModelError, match="needs the model"):
        BiasCalibration().renormalise({}, [], MergeContext())
    assert BiasCalibration().needs == {"model"}
