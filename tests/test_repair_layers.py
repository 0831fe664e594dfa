"""REPAIR, RESCALE and RESHIFT: what is measured afterwards, beside a twin that wraps layers in place of folding."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.merging import MergeContext
from fedtune.merging.renormalise._channel_moments import ChannelMoments, measure_channel_moments
from fedtune.merging.renormalise._moment_step import MomentRenormaliseStep
from fedtune.merging.renormalise.repair import Repair
from fedtune.merging.renormalise.rescale import Rescale
from fedtune.merging.renormalise.reshift import Reshift
from tests.rebasin_models import batch_for, convolutional, drawn, mlp

State = dict[str, Tensor]
STEPS: dict[str, MomentRenormaliseStep] = {"repair": Repair(), "rescale": Rescale(), "reshift": Reshift()}
NETS: dict[str, Any] = {"mlp": mlp, "convolutional": convolutional, "batch norm": lambda: convolutional("batch")}
SITES = {
    "mlp": ["0", "2"],
    "convolutional": ["0", "4", "8"],
    "batch norm": ["1", "5", "8"],
}


def batches(net: nn.Module, rows: Sequence[int] = (40, 24)) -> list[dict[str, Tensor]]:
    """Batches of unequal size."""
    return [{"input": part} for part in batch_for(net, sum(rows))["input"].split(list(rows))]


def two_ends(make: Any) -> tuple[nn.Module, State, list[tuple[float, State]]]:
    """A net, the plain merge of two at 0.3 and 0.7, and those two."""
    one, two = (copy.deepcopy(drawn(make(), seed).state_dict()) for seed in (1, 2))
    merged = {n: 0.3 * one[n] + 0.7 * two[n] if one[n].is_floating_point() else one[n] for n in one}
    return make().eval(), merged, [(0.3, one), (0.7, two)]


def moments(net: nn.Module, state: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, ChannelMoments]:
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(dict(state))
    return measure_channel_moments(loaded.eval(), batches(net), set(layers))


def goal(net: nn.Module, ends: Sequence[tuple[float, State]], layers: Sequence[str]) -> dict[str, ChannelMoments]:
    found = [(weight, moments(net, state, layers)) for weight, state in ends]
    return {
        layer: ChannelMoments(
            sum((w * of[layer].mean for w, of in found), torch.zeros(())),
            sum((w * of[layer].std for w, of in found), torch.zeros(())),
        )
        for layer in layers
    }


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("step", STEPS)
def test_after_the_fold_every_channel_has_what_the_step_promises(step: str, name: str) -> None:
    net, merged, ends = two_ends(NETS[name])
    mended = merged | STEPS[step].renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    found, wanted = moments(net, mended, SITES[name]), goal(net, ends, SITES[name])
    before = moments(net, merged, SITES[name])
    for layer in SITES[name]:
        alive = found[layer].std > 1e-6
        if STEPS[step].matches_std:
            torch.testing.assert_close(found[layer].std[alive], wanted[layer].std[alive], rtol=1e-4, atol=0)
            assert float((before[layer].std / wanted[layer].std - 1)[alive].abs().max()) > 0.05
        if STEPS[step].matches_mean:
            torch.testing.assert_close(found[layer].mean, wanted[layer].mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("step", STEPS)
def test_one_end_alone_and_like_ends_change_nothing(step: str, name: str) -> None:
    net, _, ends = two_ends(NETS[name])
    one, other = ends[0][1], ends[1][1]
    for weighted in ([(1.0, one), (0.0, other)], [(0.4, one), (0.6, one)]):
        changed = STEPS[step].renormalise(one, weighted, MergeContext(model=net, calibration_batches=batches(net)))
        assert changed
        for key, tensor in changed.items():
            torch.testing.assert_close(tensor, one[key], rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    """The readable twin: a layer whose output is scaled and shifted, in double precision."""

    def __init__(self, layer: nn.Module, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.layer, self.gain, self.shift = layer, gain, shift

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        shape = (1, -1, *[1] * (z.dim() - 2))
        out: Tensor = z * self.gain.reshape(shape) + self.shift.reshape(shape)
        return out


def wrapped(
    step: MomentRenormaliseStep, net: nn.Sequential, goals: dict[str, ChannelMoments], inputs: Tensor
) -> nn.Sequential:
    """Layer after layer, each wrapped before the next is measured."""
    layers = list(net.double())
    for name, wanted in goals.items():
        at = int(name)
        z = nn.Sequential(*layers[: at + 1])(inputs)
        over = [axis for axis in range(z.dim()) if axis != 1]
        mean, deviation = z.mean(over), z.var(over, unbiased=False).sqrt()
        gain = wanted.std / deviation if step.matches_std else torch.ones_like(mean)
        gain[deviation < 1e-8] = 1.0
        layers[at] = Wrapped(layers[at], gain, wanted.mean - gain * mean if step.matches_mean else 0 * gain)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("step", STEPS)
def test_the_folded_net_is_the_wrapped_net(step: str, name: str) -> None:
    net, merged, ends = two_ends(NETS[name])
    goals = goal(net, ends, SITES[name])
    changed = STEPS[step].renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    inputs = torch.cat([batch["input"] for batch in batches(net)]).double()
    folded, plain = copy.deepcopy(net).double(), copy.deepcopy(net)
    folded.load_state_dict(merged | changed)
    plain.load_state_dict(merged)
    assert isinstance(plain, nn.Sequential)
    with torch.no_grad():
        # in RESCALE the twin multiplies z by its gain, bias and all
        twin = wrapped(STEPS[step], plain, goals, inputs)(inputs)
        torch.testing.assert_close(folded(inputs), twin, rtol=1e-4, atol=1e-4)


def test_mended_all_at_once_deep_layers_are_corrected_twice() -> None:
    net, merged, ends = two_ends(lambda: mlp(12, 32, 32, 32, 32, 5))
    layers = ["0", "2", "4", "6"]
    wanted, before = goal(net, ends, layers), moments(net, merged, layers)
    at_once = dict(merged)
    for layer in layers:
        gain = (wanted[layer].std / before[layer].std).float()
        shift = wanted[layer].mean.float() - gain * before[layer].mean.float()
        at_once[f"{layer}.weight"] = gain[:, None] * merged[f"{layer}.weight"]
        at_once[f"{layer}.bias"] = gain * merged[f"{layer}.bias"] + shift
    in_turn = merged | Repair().renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    off = [
        float((moments(net, state, layers)["6"].std / wanted["6"].std - 1).abs().mean()) for state in (at_once, in_turn)
    ]
    assert off[1] < 1e-4 < 0.3 < off[0]


def test_rescaling_one_layer_multiplies_its_output_bias_and_all() -> None:
    net, merged, ends = two_ends(lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5)))
    changed = Rescale().renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    x = batch_for(net)["input"]
    before, after = ((x @ of["0.weight"].T + of["0.bias"]).detach() for of in (merged, changed))
    gain = after / before
    torch.testing.assert_close(gain, gain[:1].expand_as(gain), rtol=1e-3, atol=1e-4)
    assert float((gain[0] - 1).abs().max()) > 0.05


@pytest.mark.parametrize("step", STEPS)
def test_a_channel_that_does_not_vary_keeps_its_gain(step: str) -> None:
    net, merged, ends = two_ends(mlp)
    merged["0.weight"][3] = 0.0
    changed = STEPS[step].renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    assert all(bool(tensor.isfinite().all()) for tensor in changed.values())
    assert bool((changed["0.weight"][3] == 0).all())
    wanted = goal(net, ends, ["0"])["0"].mean[3] if STEPS[step].matches_mean else merged["0.bias"][3]
    assert float(changed["0.bias"][3]) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize(("size", "alive"), [(1e-5, True), (1e-6, True), (1e-11, False)])
def test_a_faint_channel_is_mended_and_what_rounding_alone_moves_is_not(size: float, alive: bool) -> None:
    net, merged, ends = two_ends(mlp)
    merged["0.weight"][3] *= size
    merged["0.bias"][3] = 0.0
    before, wanted = moments(net, merged, ["0"])["0"].std[3], goal(net, ends, ["0"])["0"].std[3]
    assert (float(before) > 1e-8) == alive
    mended = merged | Rescale().renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    found = moments(net, mended, ["0"])["0"].std[3]
    torch.testing.assert_close(found, wanted if alive else before, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("deviation", "gain"), [(2e-8, 1e8), (1e-8, 2e8), (0.9e-8, 1.0), (0.0, 1.0)])
def test_a_channel_lives_from_a_deviation_of_1e_8_on(deviation: float, gain: float) -> None:
    now, wanted = (ChannelMoments(torch.zeros(1), torch.tensor([d], dtype=torch.float64)) for d in (deviation, 2.0))
    assert float(Rescale()._change(now, wanted).gain) == pytest.approx(gain)


def test_moments_are_those_of_all_batches_together_even_far_from_zero() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net.load_state_dict({name: torch.full_like(t, float(t.dim() > 1)) for name, t in net.state_dict().items()})
    values = 1000 + torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    found = measure_channel_moments(net, [{"input": part} for part in values.split([3, 40, 7])], {"0"})["0"]
    assert float(found.mean) == pytest.approx(float(values.double().mean()), rel=1e-12)
    assert float(found.std) == pytest.approx(float(values.double().std(unbiased=False)), rel=1e-9)


def test_the_logits_stay_as_merged_and_the_architecture_keeps_its_weights() -> None:
    net, merged, ends = two_ends(mlp)
    own = copy.deepcopy(net.state_dict())
    changed = Repair().renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    assert changed.keys() == {f"{layer}.{part}" for layer, part in itertools.product("02", ("weight", "bias"))}
    assert all(torch.equal(tensor, own[key]) for key, tensor in net.state_dict().items())


def test_batch_norms_take_the_change_of_what_they_normalise() -> None:
    net, merged, ends = two_ends(NETS["batch norm"])
    changed = Repair().renormalise(merged, ends, MergeContext(model=net, calibration_batches=batches(net)))
    assert {key.split(".")[0] for key in changed} == {"1", "5", "8"}


def test_layers_without_a_bias_are_rescaled_but_not_shifted() -> None:
    net, merged, ends = two_ends(lambda: mlp(12, 16, 16, 5, bias=False))
    evidence = MergeContext(model=net, calibration_batches=batches(net))
    for step in (Repair(), Reshift()):
        with pytest.raises(ModelError, match="'0' has no bias to shift; take rescale"):
            step.renormalise(merged, ends, evidence)
    mended = merged | Rescale().renormalise(merged, ends, evidence)
    found, wanted = moments(net, mended, ["0", "2"]), goal(net, ends, ["0", "2"])
    for layer in ("0", "2"):
        torch.testing.assert_close(found[layer].std, wanted[layer].std, rtol=1e-4, atol=0)


def test_what_cannot_be_mended_is_refused_in_one_sentence() -> None:
    net, merged, ends = two_ends(mlp)
    with pytest.raises(ModelError, match="repair: it needs the model and calibration data"):
        Repair().renormalise(merged, ends, MergeContext(model=net))
    with pytest.raises(ModelError, match="the model has no 'other'"):
        Repair().renormalise(
            {**merged, "other": torch.ones(1)}, ends, MergeContext(model=net, calibration_batches=batches(net))
        )
    single, one, pair = two_ends(lambda: nn.Sequential(nn.Linear(12, 5)))
    with pytest.raises(ModelError, match="no layer to mend before its logits"):
        Repair().renormalise(one, pair, MergeContext(model=single, calibration_batches=batches(single)))
