"""Masked weights on the wire."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.client_update import TensorSpec, decode_tensors, pack
from fedtune.wire.masked_weights import (
    decode_masked_state,
    encode_masked_state,
    find_masks,
    restore_dense_tensors,
    select_active_values,
)
from fedtune.wire.update_checks import NormLimit, check_client_update

SHAPES = {"a.weight": (13, 5), "weight": (4, 3, 3, 3)}


def a_state(density: float, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {"a.bias": torch.randn(13, generator=random)}
    for name, shape in SHAPES.items():
        mask = (torch.rand(shape, generator=random) < density).to(torch.uint8)
        state[name.replace("weight", "mask")] = mask
        state[name] = torch.randn(shape, generator=random) * mask
    return state


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_a_state_arrives_as_it_was_sent(density: float) -> None:
    state = a_state(density)
    back = decode_masked_state(decode_tensors(pack(encode_masked_state(state))), SHAPES)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_values_are_those_under_the_mask_in_memory_order() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.uint8)
    found = find_masks({"weight": weight, "mask": mask, "b.mask": mask})
    assert found.keys() == {"weight"}
    assert select_active_values({"weight": weight, "b": weight}, found)["weight"].tolist() == [1, 3, 4]
    assert restore_dense_tensors({"weight": torch.tensor([1.0, 3, 4])}, found)["weight"].tolist() == [
        [0, 1, 0],
        [3, 4, 0],
    ]


def test_a_mask_costs_a_bit_per_weight_and_less_where_it_deflates() -> None:
    for density, at_most in ((0.5, 1.0), (0.1, 0.6), (0.02, 0.25)):
        mask = (torch.rand(80_000, generator=torch.Generator().manual_seed(1)) < density).to(torch.uint8)
        bits = encode_masked_state({"weight": mask.float(), "mask": mask})["mask"]
        assert bits.numel() <= math.ceil(at_most * 80_000 / 8)


def test_a_mask_of_no_weight_of_the_model_is_refused() -> None:
    state = {**a_state(0.3), "b.weight": torch.ones(2), "b.mask": torch.ones(2, dtype=torch.uint8)}
    with pytest.raises(ClientUpdateError, match=r"there is a mask of b\.weight, which is no weight of this model"):
        decode_masked_state(encode_masked_state(state), SHAPES)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda wire: wire | {"weight": wire["weight"][1:]}, "values, its mask"),
        (lambda wire: wire | {"mask": wire["mask"][:3]}, "the mask of weight"),
        (lambda wire: wire | {"mask": torch.zeros(100, dtype=torch.uint8)}, "the mask of weight"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(spoil: object, reason: str) -> None:
    assert callable(spoil)
    with pytest.raises(ClientUpdateError, match=reason):
        decode_masked_state(spoil(encode_masked_state(a_state(0.3))), SHAPES)


@pytest.mark.parametrize(
    ("place", "gradient", "reason"),
    [
        (torch.tensor([0, 9], dtype=torch.int32), torch.ones(2), None),
        (torch.tensor([0, 10], dtype=torch.int32), torch.ones(2), "outside 0 to 9"),
        (torch.tensor([-1, 3], dtype=torch.int32), torch.ones(2), "outside 0 to 9"),
        (torch.tensor([1, 3]), torch.ones(2), "is I64 instead of I32"),
        (torch.tensor([1, 3], dtype=torch.int32), torch.tensor([1.0, math.nan]), "not finite"),
        (torch.tensor([1, 3], dtype=torch.int32), torch.ones(3), "has shape"),
    ],
)
def test_what_travels_beside_deltas_is_checked(
    tmp_path: Path, place: Tensor, gradient: Tensor, reason: str | None
) -> None:
    path = tmp_path / "sent.safetensors"
    path.write_bytes(pack({"delta": torch.tensor([3.0, 4.0]), "place": place, "gradient": gradient}))
    forms = {"place": TensorSpec((2,), "I32", 10), "gradient": TensorSpec((2,))}
    if reason is None:
        assert check_client_update(path, {"delta": (2,)}, forms, NormLimit(5.0, "max")) == 5.0
        return
    with pytest.raises(ClientUpdateError, match=reason):
        check_client_update(path, {"delta": (2,)}, forms)
