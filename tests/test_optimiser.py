import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedtune.recipe.schema import Optimiser, Train
from fedtune.training.optimisers import BitsandbytesOptimiser, compute_lr_factor, make_optimiser


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
    settings = Train.model_validate({"local_steps": 1, "lr_schedule": schedule, "warmup_ratio": warmup})
    assert compute_lr_factor(settings, progress) == pytest.approx(factor, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", get_args(Optimiser))
def test_every_optimiser_goes_downhill(name: Optimiser) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 128))
    optimiser = make_optimiser(Train(local_steps=1, optimiser=name, lr=1e-2), [weight])
    start = weight.detach().square().sum().item()
    for _ in range(5):
        weight.grad = None
        weight.square().sum().backward()
        optimiser.step(1e-2)
    assert weight.isfinite().all()
    assert weight.detach().square().sum().item() < start


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_an_eight_bit_optimiser_keeps_its_state_in_bytes(name: Optimiser) -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    optimiser = make_optimiser(Train(local_steps=1, optimiser=name), [weight])
    weight.square().sum().backward()
    optimiser.step(1e-3)
    assert isinstance(optimiser, BitsandbytesOptimiser)
    assert optimiser.optimiser.state[weight]["state1"].dtype == torch.uint8


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_weight_decay_and_the_rate_reach_every_optimiser() -> None:
    for name in get_args(Optimiser):
        weight = nn.Parameter(torch.ones(2))
        optimiser = make_optimiser(Train(local_steps=1, optimiser=name, weight_decay=0.3), [weight])
        (0 * weight.sum()).backward()
        optimiser.step(0.5)
        assert weight.tolist() == pytest.approx([1 - 0.5 * 0.3] * 2)


@pytest.mark.parametrize(("name", "twin"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_adamw_and_sgd_are_torchs_own_to_the_bit(name: Optimiser, twin: type[torch.optim.Optimizer]) -> None:
    random = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3, generator=random)) for _ in range(3)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimiser = make_optimiser(Train(local_steps=1, optimiser=name, weight_decay=0.1), ours)
    reference = twin(theirs, lr=1.0, weight_decay=0.1)  # type: ignore[call-arg]
    for step in range(4):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(5, 3, generator=random) if (step + index) % 3 else None
            one.grad, other.grad = gradient, gradient
        optimiser.step(0.1 / (step + 1))
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        reference.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_step_of_adamw_or_sgd_does_not_import_the_compiler() -> None:
    script = (
        "import sys, torch\n"
        "from fedtune.recipe.schema import Train\n"
        "from fedtune.training.optimisers import make_optimiser\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "weight.sum().backward()\n"
        "for name in ('adamw', 'sgd'):\n"
        "    make_optimiser(Train(local_steps=1, optimiser=name), [weight]).step(0.1)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize(("momentum", "nesterov", "decay"), [(0.0, False, 0.0), (0.9, False, 0.01), (0.5, True, 0.01)])
def test_sgd_is_torchs_own_step_for_step(momentum: float, nesterov: bool, decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.ParameterList([torch.ones(3, 2), torch.full((4,), 2.0)]) for _ in range(2))
    settings = {"local_steps": 1, "optimiser": "sgd", "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    optimiser = make_optimiser(Train.model_validate(settings), list(ours))
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    for step in range(4):
        for both in (ours, theirs):
            both[0].grad = torch.linspace(-1, 1, 6).reshape(3, 2) * (step + 1)
            both[1].grad = None if step == 1 else torch.ones(4)  # one that has no gradient for a step
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimiser.step(0.1 / (step + 1))
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "clip"),
    [
        ({}, 1.0),
        ({"optimiser": "adamw"}, 1.0),
        ({"optimiser": "sgd"}, None),
        ({"optimiser": "sgd", "max_grad_norm": 1.0}, 1.0),
        ({"optimiser": "sgd", "max_grad_norm": None}, None),
        ({"optimiser": "adamw", "max_grad_norm": None}, None),
    ],
)
def test_plain_sgd_clips_nothing_unless_it_is_asked_to(settings: dict[str, Any], clip: float | None) -> None:
    train = Train.model_validate({"local_steps": 1, **settings})
    assert train.max_grad_norm == clip
    assert Train.model_validate_json(train.model_dump_json()) == train


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"momentum": 0.9}, "momentum and nesterov are settings of sgd, but optimiser is adamw"),
        ({"optimiser": "lion_8bit", "nesterov": True}, "are settings of sgd, but optimiser is lion_8bit"),
        ({"optimiser": "sgd", "nesterov": True}, "nesterov needs a momentum"),
        ({"optimiser": "sgd", "momentum": 1.0}, "less than 1"),
    ],
)
def test_momentum_where_there_is_none_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Train.model_validate({"local_steps": 1, **settings})


@pytest.mark.parametrize("shape", [(3000, 700), (1500, 3, 500), (1 << 21,), (1, 1 << 21), (2, 1 << 20)])
def test_a_large_parameter_is_stepped_in_pieces_to_the_same_bits(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    stepper = make_optimiser(Train(local_steps=1, weight_decay=0.1), [ours])
    torchs = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=random)
        theirs.grad = ours.grad.clone()
        stepper.step(1e-3)
        torchs.step()
        assert torch.equal(ours, theirs)
