from typing import get_args

import pytest
import torch
from torch import nn

from fedtune.recipe import Optimiser, Train
from fedtune.training.optimiser import make_optimiser, rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "factor"),
    [
        ("constant", 0.0, 0.0, 1.0),
        ("constant", 0.0, 0.9, 1.0),
        ("linear", 0.0, 0.0, 1.0),
        ("linear", 0.0, 0.25, 0.75),
        ("linear", 0.0, 1.0, 0.0),
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.0, 0.5, 0.5),
        ("cosine", 0.0, 1 / 3, 0.75),
        ("cosine", 0.0, 1.0, 0.0),
        ("constant", 0.2, 0.05, 0.25),
        ("linear", 0.2, 0.0, 0.0),
        ("linear", 0.2, 0.1, 0.5),
        ("linear", 0.2, 0.2, 1.0),
        ("linear", 0.2, 0.6, 0.5),
        ("cosine", 0.5, 0.75, 0.5),
    ],
)
def test_the_rate_is_the_closed_form(schedule: str, warmup: float, progress: float, factor: float) -> None:
    settings = Train.model_validate({"steps": 1, "schedule": schedule, "warmup": warmup})
    assert rate(settings, progress) == pytest.approx(factor, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", get_args(Optimiser))
def test_every_optimiser_goes_downhill(name: Optimiser) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 128))
    optimiser = make_optimiser(Train(steps=1, optimiser=name, lr=1e-2), [weight])
    start = weight.detach().square().sum().item()
    for _ in range(5):
        optimiser.zero_grad()
        weight.square().sum().backward()
        optimiser.step()
    assert weight.isfinite().all()
    assert weight.detach().square().sum().item() < start


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_an_eight_bit_optimiser_keeps_its_state_in_bytes(name: Optimiser) -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    optimiser = make_optimiser(Train(steps=1, optimiser=name), [weight])
    weight.square().sum().backward()
    optimiser.step()
    assert optimiser.state[weight]["state1"].dtype == torch.uint8


def test_weight_decay_reaches_the_optimiser() -> None:
    for name in get_args(Optimiser):
        optimiser = make_optimiser(Train(steps=1, optimiser=name, weight_decay=0.3), [nn.Parameter(torch.ones(2))])
        assert optimiser.param_groups[0]["weight_decay"] == 0.3
