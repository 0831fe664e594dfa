import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.errors import ModelError
from fedtune.merging.align.rebasin._graph_tracing import trace_permutation_spec
from fedtune.merging.align.rebasin._permutations import HeadLayout, PermutationSpec, PermutedAxis, UnitLayout
from tests.rebasin_models import (
    NETS,
    TEXT,
    Residual,
    convolutional,
    drawn,
    grouped_llama,
    inverse,
    mlp,
    outputs,
    shuffled,
    symmetry_of,
)

ALL = {**NETS, **TEXT}


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def centred(logits: Tensor) -> Tensor:
    """What of the logits depends on the input."""
    return logits - logits.mean(0)


def permuted(model: nn.Module, symmetry: PermutationSpec, orders: Any) -> dict[str, Tensor]:
    return {name: symmetry.permute(name, tensor, orders) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ALL)
def test_a_permuted_net_is_another_net_that_computes_the_same(name: str) -> None:
    model = drawn(ALL[name]())
    symmetry = symmetry_of(model)
    state = permuted(model, symmetry, shuffled(symmetry))
    assert len(symmetry.kinds) > 1
    assert relative(centred(outputs(model, state)), centred(outputs(model))) < 2e-6
    moved = [key for key in symmetry.list_permuted_tensors() if not torch.equal(state[key], model.state_dict()[key])]
    assert len(moved) > 0.9 * len(symmetry.list_permuted_tensors())


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_covered_once_and_a_permutation_undone_is_none(name: str) -> None:
    model = drawn(ALL[name]())
    symmetry, state = symmetry_of(model), model.state_dict()
    symmetry.check_shapes({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert symmetry.axes.keys() == state.keys()
    assert {axis.permutation for axes in symmetry.axes.values() for axis in axes if axis} == symmetry.kinds.keys()
    orders = shuffled(symmetry)
    there = permuted(model, symmetry, orders)
    back = {key: symmetry.permute(key, tensor, inverse(orders)) for key, tensor in there.items()}
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["residual", "convolutional, norm batch", "bert", "gpt2", "llama"])
def test_a_permutation_forgotten_in_any_one_tensor_shows(name: str) -> None:
    """A planted fault in each tensor in turn; position tables apart, which a net drawn at random may barely use."""
    model = drawn(ALL[name]())
    symmetry, own = symmetry_of(model), outputs(model)
    orders = shuffled(symmetry)
    for key in symmetry.list_permuted_tensors():
        state = permuted(model, symmetry, orders)
        state[key] = model.state_dict()[key]
        tied = "lm_head" in key or "wte" in key or "embed_tokens" in key
        if not (tied or key.endswith("key.bias")):  # a bias of keys adds the same to all scores of a query
            assert relative(outputs(model, state), own) > 1e-6, key


def test_streams_blocks_and_depthwise_layers_are_read_off_the_graph() -> None:
    residual = trace_permutation_spec(Residual()).axes
    assert residual["stem.weight"] == (PermutedAxis("stem"), None, None, None)
    assert residual["outer.weight"][:2] == (PermutedAxis("stem"), PermutedAxis("inner"))
    assert residual["norm.running_var"] == (PermutedAxis("stem"),)
    assert residual["norm.num_batches_tracked"] == ()
    assert residual["narrow.weight"][0] == residual["shortcut.weight"][0]
    assert residual["head.weight"] == (None, residual["narrow.weight"][0])
    assert trace_permutation_spec(convolutional()).axes["8.weight"] == (PermutedAxis("8"), PermutedAxis("4", block=16))
    mobile = trace_permutation_spec(NETS["mobilenet-v2"]()).axes
    assert mobile["features.2.conv.1.0.weight"] == (mobile["features.2.conv.0.0.weight"][0], None, None, None)
    assert mobile["features.2.conv.2.weight"][0] == mobile["features.3.conv.2.weight"][0]


def test_channels_of_a_group_norm_stay_with_their_group() -> None:
    assert set(trace_permutation_spec(convolutional("group")).kinds.values()) == {UnitLayout(8, 4), UnitLayout(12)}
    model = drawn(convolutional("group"))
    symmetry = trace_permutation_spec(model)
    across = {name: {"": torch.randperm(kind.parts[""])} for name, kind in symmetry.kinds.items()}
    assert relative(outputs(model, permuted(model, symmetry, across)), outputs(model)) > 1e-3


class Odd(nn.Module):
    """A net of two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], **more: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)
        self.between = between
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        out: Tensor = self.second(self.between(self.first(input)))
        return out


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer": (lambda: nn.Sequential(nn.Linear(12, 8), nn.PReLU(8), nn.Linear(8, 5)), "1 is a PReLU, which"),
    "a softmax": (lambda: nn.Sequential(nn.Linear(12, 8), nn.Softmax(-1), nn.Linear(8, 5)), "1 is a Softmax, which"),
    "a function": (lambda: Odd(lambda x: x.cumsum(-1)), "calls or reads 'cumsum'"),
    "a parameter": (lambda: Odd(lambda x: x, scale=nn.Parameter(torch.ones(8))), "'scale' belongs to no layer"),
    "an unused layer": (lambda: Odd(F.relu, spare=nn.Linear(3, 3)), "'spare.weight' belongs to no layer"),
    "a choice": (lambda: Odd(lambda x: x if x.sum() > 0 else -x), "Odd cannot be traced"),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), "1 is a grouped convolution"),
    "columns": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8)), "1 is a linear layer on the columns"),
    "unequal groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1)),
        "2 groups channels that are grouped otherwise",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_named(name: str) -> None:
    make, message = UNKNOWN[name]
    with pytest.raises(ModelError, match=message):
        trace_permutation_spec(make())


def test_a_tensor_that_the_tables_lack_is_named() -> None:
    model = TEXT["bert"]()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"does not know what 'extra\.weight' does"):
        symmetry_of(model)


def test_other_names_other_shapes_and_layers_onto_themselves_are_refused() -> None:
    symmetry = trace_permutation_spec(mlp())
    with pytest.raises(ModelError, match=r"nothing is known of 'other'"):
        symmetry.check_shapes({"other": (3,)})
    with pytest.raises(ModelError, match=r"'0\.weight' has shape \[3, 12\] in place of \[16, 'any'\]"):
        symmetry.check_shapes({"0.weight": (3, 12)})
    onto = PermutationSpec({"a": (PermutedAxis("p"), PermutedAxis("p"))}, {"p": UnitLayout(4)})
    with pytest.raises(ModelError, match="'a' maps units onto themselves"):
        onto.check_shapes({"a": (4, 4)})


LAYER = "model.layers.0.self_attn"


def changed(**projections: Callable[[Tensor], Tensor]) -> float:
    """The relative change of a grouped decoder's logits when rows of q, k, v or columns of o are moved."""
    model = drawn(grouped_llama())
    state = copy.deepcopy(model.state_dict())
    for name, move in projections.items():
        weight = state[f"{LAYER}.{name}_proj.weight"]
        moved = move(weight.T).T if name == "o" else move(weight)
        state[f"{LAYER}.{name}_proj.weight"] = moved
    return relative(outputs(model, state), outputs(model))


def by_head(weight: Tensor, heads: int, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to the rows [heads, 4, in] of a projection."""
    moved: Tensor = move(weight.unflatten(0, (heads, 4)))
    return moved.flatten(0, 1)


def test_queries_may_move_inside_their_group_but_not_to_another() -> None:
    inside = [1, 0, 2, 3, 5, 4, 8, 7, 6]
    assert (
        changed(q=lambda w: by_head(w, 9, lambda h: h[inside]), o=lambda w: by_head(w, 9, lambda h: h[inside])) < 1e-10
    )
    across = [3, 1, 2, 0, 4, 5, 6, 7, 8]
    assert (
        changed(q=lambda w: by_head(w, 9, lambda h: h[across]), o=lambda w: by_head(w, 9, lambda h: h[across])) > 0.01
    )


def test_channels_of_queries_and_keys_may_not_move_under_rotary_positions() -> None:
    order = [1, 0, 2, 3]
    assert (
        changed(q=lambda w: by_head(w, 9, lambda h: h[:, order]), k=lambda w: by_head(w, 3, lambda h: h[:, order]))
        > 1e-3
    )


def test_a_rotation_inside_each_pair_of_frequencies_is_exact() -> None:
    cos, sin = 0.6, 0.8

    def turn(heads: Tensor) -> Tensor:
        low, high = heads[:, :2], heads[:, 2:]
        return torch.cat([cos * low - sin * high, sin * low + cos * high], 1)

    assert changed(q=lambda w: by_head(w, 9, turn), k=lambda w: by_head(w, 3, turn)) < 1e-6
    assert changed(q=lambda w: by_head(w, 9, turn)) > 1e-3


def test_an_orthogonal_map_of_a_groups_values_is_exact() -> None:
    orthogonal = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]

    def turn(heads: Tensor) -> Tensor:
        return torch.matmul(orthogonal, heads)

    assert changed(v=lambda w: by_head(w, 3, turn), o=lambda w: by_head(w, 9, turn)) < 1e-6
    assert changed(v=lambda w: by_head(w, 3, turn)) > 1e-3


def test_an_orthogonal_map_of_the_stream_needs_folded_norms_and_an_untied_head() -> None:
    model = drawn(grouped_llama())
    untied = grouped_llama(tied=False)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    untied.load_state_dict(state)
    own = outputs(untied)
    turn = torch.linalg.qr(torch.randn(36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    assert relative(outputs(untied, turned(folded(state), turn)), own) < 1e-5
    assert relative(outputs(untied, turned(state, turn)), own) > 0.01


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weight of each RMS norm multiplied into the layers that read it."""
    found = dict(state)
    readers = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
    for name, weight in state.items():
        norm = name.split(".")[-2]
        layer = name.split(norm)[0]
        read = [key for key in state if key.startswith(layer) and key.split(".")[-2] in readers.get(norm, ())]
        for key in ["lm_head.weight"] if name == "model.norm.weight" else read:
            found[key] = state[key] * weight
        if norm in readers or name == "model.norm.weight":
            found[name] = torch.ones_like(weight)
    return found


def turned(state: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """All that reads the stream, or is written to it, in other coordinates."""
    writes = ("o_proj.weight", "down_proj.weight")
    return {name: turn @ t if name.endswith(writes) else t @ turn.T if t.dim() > 1 else t for name, t in state.items()}


def test_parts_of_heads_count_what_projections_have() -> None:
    assert HeadLayout(3, 3, 4, 4, is_rotary=True).parts == {"q": 36, "k": 12, "v": 12, "o": 36}
    assert symmetry_of(TEXT["gpt2"]()).axes["transformer.h.0.attn.c_attn.weight"] == (
        PermutedAxis("stream"),
        PermutedAxis("transformer.h.0.heads", ("q", "k", "v")),
    )
