from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.merging import MergeContext, MergeInput, build_pipeline, merge_client_updates
from fedtune.merging.align.rebasin._graph_tracing import trace_permutation_spec
from fedtune.merging.align.rebasin.rebasin import Rebasin
from fedtune.recipe.schema import Unit
from fedtune.wire import client_update
from fedtune.wire.client_update import ClientUpdate, iter_row_chunks, pack
from tests.rebasin_models import (
    NETS,
    TEXT,
    batch_for,
    convolutional,
    drawn,
    lively,
    mlp,
    operand,
    outputs,
    shuffled,
    symmetry_of,
    zeros,
)

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def permuted(model: nn.Module, seed: int) -> State:
    symmetry = symmetry_of(model)
    orders = shuffled(symmetry, seed)
    return {name: symmetry.permute(name, tensor, orders) for name, tensor in model.state_dict().items()}


def ended(base: State, one: MergeInput) -> State:
    """A model from its operand, read piece by piece."""
    return {
        name: before
        + torch.cat([one.read_rows(name, *piece) for piece in iter_row_chunks(tuple(before.shape))]).reshape(
            before.shape
        )
        if before.is_floating_point()
        else before
        for name, before in base.items()
    }


def evidence(model: nn.Module) -> MergeContext:
    return MergeContext(model=model, calibration_batches=[batch_for(model, 64)])


def aligned(model: nn.Module, base: State, ends: Sequence[State], **settings: Any) -> list[State]:
    operands = Rebasin(**settings).align(base, [operand(base, end) for end in ends], evidence(model))
    return [ended(base, one) for one in operands]


@pytest.mark.parametrize("method", ["weight", "activation"])
@pytest.mark.parametrize("many", ["first", "mean-of-others"])
def test_shuffled_copies_come_back_to_one_model_over_any_base(method: str, many: str) -> None:
    model = lively(drawn(convolutional("batch")))
    base = state_of(drawn(convolutional("batch"), 9))
    ends = [state_of(model), permuted(model, 1), permuted(model, 2)]
    found = aligned(model, base, ends, method=method, reference=many)
    for end in found[1:]:
        for name, tensor in end.items():
            torch.testing.assert_close(tensor, found[0][name], rtol=0, atol=1e-5)
    if many == "first":
        torch.testing.assert_close(found[1]["0.weight"], ends[0]["0.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "residual", "bert", "gpt2", "llama"])
def test_aligned_models_compute_what_they_did(name: str) -> None:
    model, other = (drawn({**NETS, **TEXT}[name](), seed) for seed in (1, 2))
    base = zeros(model.state_dict())
    first, second = aligned(model, base, [state_of(model), state_of(other)])
    assert all(torch.equal(tensor, first[key]) for key, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, second[key]) for key, tensor in other.state_dict().items())
    torch.testing.assert_close(outputs(model, second), outputs(other), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = drawn(mlp()), zeros(mlp().state_dict())
    ends = [state_of(model), permuted(model, 1)]
    whole = aligned(model, base, ends)[1]
    monkeypatch.setattr(client_update, "_PIECE", 20)
    pieced = aligned(model, base, ends)[1]
    assert all(torch.equal(whole[name], pieced[name]) for name in base)


@pytest.mark.parametrize("many", ["first", "mean-of-others"])
@pytest.mark.parametrize("method", ["weight", "activation"])
def test_clients_of_one_start_stay_as_they_are(method: str, many: str) -> None:
    model = drawn(mlp(12, 64, 64, 5))
    base = state_of(model)
    ends = [{name: t + 0.1 * t.std() * torch.randn(t.shape) for name, t in base.items()} for _ in range(4)]
    sent = [operand(base, end) for end in ends]
    found = Rebasin(method=method, reference=many).align(base, sent, evidence(model))
    assert all(one is other for one, other in zip(found, sent, strict=True))


def test_a_gain_below_one_percent_is_not_taken() -> None:
    model = drawn(mlp(12, 300, 5))
    base, end = zeros(model.state_dict()), state_of(model)
    swapped = {name: tensor.clone() for name, tensor in end.items()}
    symmetry = trace_permutation_spec(model)
    order = torch.arange(300)
    order[[0, 1]] = order[[1, 0]]
    swapped = {name: symmetry.permute(name, tensor, {"0": {"": order}}) for name, tensor in swapped.items()}
    found = aligned(model, base, [end, swapped])[1]
    assert all(torch.equal(found[name], swapped[name]) for name in swapped)


def test_weights_and_knobs_of_a_model_are_kept_and_one_model_stays() -> None:
    model = drawn(mlp())
    base = zeros(model.state_dict())
    sent = [
        operand(base, state_of(model), 0.7),
        operand(base, permuted(model, 1), 0.3)._replace(overrides={"density": 0.5}),
    ]
    found = Rebasin().align(base, sent, evidence(model))
    assert [(one.weight, one.overrides) for one in found] == [(0.7, {}), (0.3, {"density": 0.5})]
    assert found[1] is not sent[1]
    assert Rebasin(reference="mean-of-others").align(base, sent[:1], evidence(model)) == sent[:1]


def test_the_same_models_give_the_same_bits() -> None:
    model, other = (drawn(mlp(), seed) for seed in (1, 2))
    base, ends = zeros(model.state_dict()), [state_of(model), state_of(other), permuted(model, 3)]
    for settings in ({}, {"reference": "mean-of-others"}, {"method": "activation"}):
        once, again = (aligned(model, base, ends, **settings) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(once, again, strict=True) for name in base)


def test_in_the_pipeline_shuffled_copies_merge_into_the_model(tmp_path: Path) -> None:
    model = drawn(convolutional("batch"))
    base = state_of(drawn(convolutional("batch"), 9))
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    sent = []
    for client, end in enumerate([state_of(model), permuted(model, 1), permuted(model, 2)]):
        path = tmp_path / f"{client}.safetensors"
        path.write_bytes(pack({name: end[name] - base[name] for name in names}))
        sent.append(ClientUpdate(client, client + 1, path))
    steps = [Unit(name="rebasin"), Unit(name="mean")]
    merged = merge_client_updates(build_pipeline(steps), base, names, sent, evidence(model))
    torch.testing.assert_close(outputs(model, merged), outputs(model), rtol=1e-4, atol=1e-5)
    naive = merge_client_updates(build_pipeline(steps[1:]), base, names, sent, evidence(model))
    assert float((outputs(model, naive) - outputs(model)).abs().max()) > 0.1


def test_what_moves_must_be_sent_and_what_stays_need_not() -> None:
    model = drawn(mlp())
    base = state_of(model)
    end, symmetry = permuted(model, 1), trace_permutation_spec(model)
    for missing, moves in (("4.bias", False), ("2.bias", True)):
        sent = [operand(base, {name: t for name, t in one.items() if name != missing}) for one in (base, end)]
        assert (missing in symmetry.list_permuted_tensors()) == moves
        if moves:
            with pytest.raises(ModelError, match=rf"no '{missing}' was sent, which moves with others"):
                Rebasin().align(base, sent, evidence(model))
        else:
            assert Rebasin(method="activation").align(base, sent, evidence(model))[1] is not sent[1]


def test_measurements_of_a_model_do_not_survive_its_permutation() -> None:
    class Measured(dict[str, Tensor]):
        def __call__(self, name: str, start: int, stop: int) -> Tensor:
            return self[name][start:stop]

    model = drawn(mlp())
    base = zeros(model.state_dict())
    sent = [operand(base, end)._replace(statistics=Measured()) for end in (state_of(model), permuted(model, 1))]
    with pytest.raises(ModelError, match="no longer fits once it is permuted"):
        Rebasin().align(base, sent, evidence(model))


def test_what_a_method_needs_it_says_and_asks_for() -> None:
    assert Rebasin().needs == {"model"}
    assert Rebasin(method="activation").needs == {"model", "batches"}
    model = drawn(mlp())
    base = zeros(model.state_dict())
    sent = [operand(base, state_of(model))] * 2
    with pytest.raises(ModelError, match="method weight needs model"):
        Rebasin().align(base, sent, MergeContext())
    with pytest.raises(ModelError, match="method activation needs batches and model"):
        Rebasin(method="activation").align(base, sent, MergeContext(model=model))
    with pytest.raises(ModelError, match=r"nothing is known of 'other\.weight'"):
        Rebasin().align({**base, "other.weight": torch.zeros(1)}, sent, evidence(model))
