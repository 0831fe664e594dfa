"""``compact`` against the published algorithm, its wire form, and whole rounds."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.memory import StorageMeter
from fedtune.techniques.compressed._projected_linear import (
    UPDATE,
    ProjectedInputs,
    draw_projection,
    install_projection,
    merge_projection,
    set_projection,
)
from fedtune.techniques.compressed.compact import Compact
from fedtune.training import get_model_state, set_model_state
from tests.families import FAMILIES
from tests.federations import execute, words
from tests.technique_steps import chosen, gradients, logits, shake, shared

INPUTS, OUTPUTS, RANK = 24, 10, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projected_layer(rank: int = RANK, seed: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS)
    install_projection(layer, rank, ProjectedInputs())
    set_projection(layer, draw_projection(seed, 1, INPUTS, rank))
    return layer


def published_steps(weight: Tensor, bias: Tensor, projection: Tensor, steps: int, *, adam: bool) -> Tensor:
    """The readable twin: store z = x P, take the step of the optimiser on G P, and move W by it times Pᵀ."""
    mean, square = torch.zeros(OUTPUTS, projection.shape[1]), torch.zeros(OUTPUTS, projection.shape[1])
    for number in range(1, steps + 1):
        x, target = drawn(7, INPUTS, seed=number), drawn(7, OUTPUTS, seed=100 + number)
        g = 2 * (x @ weight.T + bias - target) / target.numel()
        small = g.T @ (x @ projection)
        if adam:
            mean, square = 0.9 * mean + 0.1 * small, 0.999 * square + 0.001 * small**2
            small = (mean / (1 - 0.9**number)) / ((square / (1 - 0.999**number)).sqrt() + 1e-8)
        weight = weight - 0.01 * small @ projection.T
    return weight


@pytest.mark.parametrize("adam", [False, True])
def test_the_weight_moves_as_in_the_published_algorithm(adam: bool) -> None:
    layer = projected_layer()
    start, bias = layer.weight.detach().clone(), layer.bias.detach()
    update = layer.get_parameter(UPDATE)
    optimiser = torch.optim.Adam([update], 0.01) if adam else torch.optim.SGD([update], 0.01)
    for number in range(1, 6):
        optimiser.zero_grad()
        F.mse_loss(layer(drawn(7, INPUTS, seed=number)), drawn(7, OUTPUTS, seed=100 + number)).backward()
        optimiser.step()
    projection = draw_projection(3, 1, INPUTS, RANK)
    wanted = published_steps(start, bias, projection, 5, adam=adam)
    merge_projection(layer)
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, start, atol=1e-3)


def test_gradients_of_inputs_and_biases_are_those_of_the_merged_weight() -> None:
    layer, x = projected_layer(), drawn(2, 5, INPUTS).requires_grad_()
    layer.get_parameter(UPDATE).data = drawn(OUTPUTS, RANK, seed=9)
    layer(x).pow(2).sum().backward()
    found, by_bias = x.grad, layer.bias.grad
    merged = layer.weight + layer.get_parameter(UPDATE) @ layer.get_buffer("projection").T
    other = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    F.linear(other, merged.detach(), bias).pow(2).sum().backward()
    assert found is not None
    assert by_bias is not None
    torch.testing.assert_close(found, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_bias, bias.grad, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_unbiased_with_the_noise_that_the_card_names() -> None:
    gradient = drawn(OUTPUTS, 96)
    draws = [draw_projection(0, number, 96, 24) for number in range(200)]
    found = torch.stack([gradient @ one @ one.T for one in draws])
    cosines = torch.stack([F.cosine_similarity(one.flatten(), gradient.flatten(), 0) for one in found])
    error = float((found.mean(0) - gradient).norm() / gradient.norm())
    assert float(cosines.mean()) == pytest.approx(1 / math.sqrt(1 + 4), abs=0.03)
    assert error == pytest.approx(math.sqrt(4 / 200), rel=0.15)


def test_only_the_projection_is_kept_and_layers_with_one_input_share_it() -> None:
    inputs = ProjectedInputs()
    layers = nn.ModuleList(nn.Linear(64, 3) for _ in range(3))
    projection = draw_projection(0, 1, 64, 16)
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        install_projection(layer, 16, inputs)
        set_projection(layer, projection)
    leaf = drawn(8, 10, 64).requires_grad_()
    with StorageMeter(excluded=[*layers.parameters(), *layers.buffers(), leaf]) as meter:
        x = leaf * 1.0
        out = torch.stack([layer(x).sum() for layer in layers]).sum()
        del x
        assert meter.current_bytes <= 8 * 10 * 16 * 4 + 64
    out.backward()
    assert leaf.grad is not None


def test_inputs_that_change_or_return_are_projected_anew() -> None:
    inputs, projection = ProjectedInputs(), draw_projection(0, 1, 8, 2)
    x = drawn(3, 8)
    first = inputs.project(x, projection)
    assert inputs.project(x, projection) is first
    with torch.no_grad():
        assert inputs.project(x, projection) is not first
    x.add_(1)
    assert torch.equal(inputs.project(x, projection), x @ projection)
    assert torch.equal(inputs.project(x, 2 * projection), x @ (2 * projection))
    del x
    assert inputs._known is None


def test_processes_draw_the_same_projection_and_rounds_another() -> None:
    code = (
        "from fedtune.techniques.compressed._projected_linear import draw_projection as d;"
        "print(float(d(5, 2, 33, 7).double().sum()))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    one = draw_projection(5, 2, 33, 7)
    assert float(told) == float(one.double().sum())
    assert not torch.equal(one, draw_projection(5, 3, 33, 7))


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "vit"])
def test_a_reduction_of_one_spans_the_whole_gradient(family: str) -> None:
    """G P has the gradient of the plain weight times P."""
    model, plain = FAMILIES[family].model(), FAMILIES[family].model()
    shared("compact", model, FAMILIES[family].task, reduction=1)
    shared("full", plain, FAMILIES[family].task)
    for one in (*model.modules(), *plain.modules()):
        if isinstance(one, nn.Dropout):
            one.p = 0.0
    for one in (model, plain):
        if family == "opt":
            one.config.dropout = 0.0
            for layer in one.modules():
                vars(layer).update({key: 0.0 for key in ("dropout",) if isinstance(vars(layer).get(key), float)})
    batch = FAMILIES[family].make_batch()
    found, wanted = gradients(model, batch)[0], gradients(plain, batch)[0]
    updates = [name for name in found if name.endswith(UPDATE)]
    assert len(updates) >= 8
    for name in updates:
        owner = name.rpartition(".")[0]
        projection = model.get_submodule(owner).get_buffer("projection")
        torch.testing.assert_close(found[name], wanted[f"{owner}.weight"] @ projection, rtol=1e-3, atol=1e-5)
    assert found.keys() - set(updates) == wanted.keys() - {f"{one.rpartition('.')[0]}.weight" for one in updates}


def test_matrices_alone_are_trained_if_wanted() -> None:
    model = FAMILIES["bert"].model()
    shared("compact", model, FAMILIES["bert"].task, trained="matrices")
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if not name.startswith("classifier")} == {UPDATE}
    assert {"classifier.weight", "classifier.bias"} <= trained


def test_the_server_moves_the_weights_and_the_next_round_begins_there() -> None:
    model, units = FAMILIES["bert"].model(), chosen("compact")
    names = techniques.apply_techniques(units, model, FAMILIES["bert"].task, 0)
    shake(model, [name for name in names if name.endswith(UPDATE)])
    batch = {key: one for key, one in FAMILIES["bert"].make_batch().items() if key != "labels"}
    techniques.begin_round(units, model, 3)
    before = logits(model, batch)
    state = techniques.after_aggregation(units, get_model_state(model, names), 3, [])
    assert not any(one.any() for name, one in state.items() if name.endswith(UPDATE))
    set_model_state(model, state)
    techniques.begin_round(units, model, 4)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)
    for technique in units:
        technique.merge_into_weights(model)
    assert {type(one).__module__.split(".")[0] for one in model.modules()} <= {"torch", "transformers"}
    assert not any(UPDATE in name for name in model.state_dict())
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)


def test_rounds_move_the_weights_and_repeat_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    given = "train.techniques=[{compact: {reduction: 4, trained: matrices}}]"
    compact = execute(words(tmp_path, given, "train.lr=0.02", "federation.rounds=3"), run="compact")
    again = execute(words(tmp_path, given, "train.lr=0.02", "federation.rounds=3"), run="again")
    assert compact.hashes == again.hashes
    assert len(set(compact.hashes)) == 4  # with the start


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="has no plain linear layer of its own"):
        Compact().rewrite_model(nn.Sequential(nn.Conv2d(2, 2, 1)), FAMILIES["llama"].task, 0)
