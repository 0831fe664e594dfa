"""A federated round with the vision techniques: what moves, is sent and exported; and outputs kept on disk."""

import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.techniques import apply_techniques
from fedtune.techniques.mobile._lite_residual import LiteResidual
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, set_model_state, train_local_model
from fedtune.wire.client_update import decode_tensors, pack
from tests.mobile_nets import SmallNet, age, hard_net, in_transformers, pictures
from tests.technique_steps import IMAGES, chosen, logits, shake, shared
from tests.tiny import a_training_recipe

TECHNIQUES = ("mobiletl", "last-blocks", "batch-norm", "bias", "tinytl")


@dataclass(frozen=True)
class FewPictures:
    """Twelve pictures, encoded."""

    pixels: Tensor
    labels: Tensor
    domains: None = None
    lengths: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[list(indices)], "labels": self.labels[list(indices)]}


def few_pictures() -> Any:
    drawn = pictures(12, side=64)
    return FewPictures(drawn["pixel_values"], drawn["labels"])


def a_round(model: Any, names: list[str], joined: str, **settings: Any) -> LocalTrainingResult:
    recipe = a_training_recipe(local_steps=2, batch_size=8, optimiser="adamw")
    return train_local_model(
        ClientRound(model, chosen(joined, **settings), recipe, few_pictures(), np.arange(12), 1, 1),
        get_model_state(model, names),
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("build", [SmallNet, hard_net, in_transformers])
def test_a_round_moves_what_is_shared_and_nothing_else_and_a_pickled_copy_trains_alike(
    build: Callable[[], Any], technique: str
) -> None:
    model = age(build())
    names = shared(technique, model, IMAGES)
    model.share_memory()
    other = pickle.loads(pickle.dumps(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(other.state_dict()) == list(before)
    outcome, copied = a_round(model, names, technique), a_round(other, names, technique)
    assert sorted(outcome.delta) == names
    assert outcome.train_loss == copied.train_loss
    assert all(torch.equal(outcome.delta[name], copied.delta[name]) for name in names)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(names)
    assert set(decode_tensors(pack(outcome.delta))) == set(names)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_worker_that_replaces_what_is_trained_trains_alike(technique: str) -> None:
    """As a pool's worker does with the copies it maps."""
    model = age(SmallNet())
    names = shared(technique, model, IMAGES)
    other = deepcopy(model)
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        if name in names:
            tensor.data = tensor.data.clone()
    wanted, found = a_round(model, names, technique), a_round(other, names, technique)
    assert wanted.train_loss == found.train_loss
    assert all(torch.equal(wanted.delta[name], found.delta[name]) for name in names)


def test_last_blocks_trains_alike_with_its_frozen_part_in_micro_batches() -> None:
    plain, model = age(SmallNet()), age(SmallNet())
    wanted = a_round(plain, shared("last-blocks", plain, IMAGES), "last-blocks")
    names = shared("last-blocks", model, IMAGES, micro_batch=3)
    rows: list[int] = []
    model.stem[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found = a_round(model, names, "last-blocks", micro_batch=3)
    assert rows == [3, 3, 2, 3, 1]
    assert found.train_loss == pytest.approx(wanted.train_loss, rel=1e-5)


@pytest.mark.parametrize("technique", ["last-blocks", "batch-norm", "bias", "tinytl"])
def test_statistics_may_be_trained_beside_it_in_either_order(technique: str) -> None:
    outcomes = []
    for joined in (f"{technique}+batch-norm-statistics", f"batch-norm-statistics+{technique}"):
        model = age(SmallNet())
        outcomes.append(a_round(model, shared(joined, model, IMAGES), joined))
    one, other = (outcome.delta for outcome in outcomes)
    assert one.keys() == other.keys()
    assert any("blocks.0" in name and "running" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("technique", ["mobiletl", "last-blocks", "batch-norm", "bias"])
@pytest.mark.parametrize("build", [SmallNet, hard_net, in_transformers])
def test_what_was_learned_folds_into_the_plain_net(build: Callable[[], Any], technique: str) -> None:
    model, plain = age(build()), age(build())
    names = shared(technique, model, IMAGES)
    set_model_state(model, {name: value * 1.1 for name, value in get_model_state(model, names).items()})
    batch = pictures(5)
    wanted = logits(model, batch)
    for one in chosen(technique):
        one.merge_into_weights(model)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain.modules()]
    assert not any("forward" in vars(layer) for layer in model.modules())
    plain.load_state_dict(model.state_dict())
    folded, exported = logits(model, batch), logits(plain, batch)
    assert torch.equal(folded, exported)
    assert float((folded - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_state_of_the_converted_net_is_named_as_the_untouched_nets(technique: str) -> None:
    for build in (SmallNet, in_transformers):
        model = age(build())
        names = list(model.state_dict())
        shared(technique, model, IMAGES)
        assert [name for name in model.state_dict() if "lite_residual" not in name] == names


def test_tinytl_starts_at_the_pretrained_function_and_its_branches_count_once_they_have_moved() -> None:
    plain, model = age(SmallNet()), age(SmallNet())
    names = shared("tinytl", model, IMAGES)
    assert torch.equal(logits(model, pictures()), logits(plain, pictures()))
    branches = [name for name in names if "lite_residual" in name]
    assert {name.split(".lite_residual.")[0] for name in branches} == {f"blocks.{index}" for index in range(5)}
    shake(model, branches)
    assert not torch.allclose(logits(model, pictures()), logits(plain, pictures()), atol=1e-2)


def test_tinytl_draws_its_branches_from_the_seed_alone() -> None:
    drawn: list[Tensor] = []
    for seed in (3, 3, 4):
        model = age(SmallNet())
        torch.manual_seed(len(drawn))
        before = torch.get_rng_state()
        apply_techniques(chosen("tinytl"), model, IMAGES, seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(model.state_dict()["blocks.1.lite_residual.filter.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_tinytl_without_biases_trains_branches_and_the_head_alone() -> None:
    names = shared("tinytl", age(SmallNet()), IMAGES, biases=False)
    assert all("lite_residual" in name or name.startswith("fc.") for name in names)
    assert set(shared("tinytl", age(SmallNet()), IMAGES)) - set(names) == {
        name for name in shared("bias", age(SmallNet()), IMAGES) if not name.startswith("fc.")
    }


@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_a_lite_residual_is_the_published_branch(side: int) -> None:
    """Against the branch written with PyTorch's own pooling."""
    torch.manual_seed(0)
    branch = LiteResidual(12, 16, 5, 2)
    nn.init.normal_(branch.last_norm.weight)
    x = torch.randn(3, 12, side, side)
    y = nn.functional.avg_pool2d(x, 2, 2) if side > 1 else x
    y = nn.functional.relu(branch.norm(nn.functional.conv2d(y, branch.filter.weight, padding=2, groups=2)))
    torch.testing.assert_close(branch(x), branch.last_norm(branch.mix(y)), rtol=1e-5, atol=1e-5)
    assert branch.norm.num_groups == 3


def test_tinytl_cannot_be_exported_as_a_plain_net() -> None:
    model = age(SmallNet())
    shared("tinytl", model, IMAGES)
    [technique] = chosen("tinytl")
    with pytest.raises(
        ModelError, match="tinytl adds branches that a plain SmallNet does not have; evaluate the run instead"
    ):
        technique.merge_into_weights(model)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    return tmp_path / "outputs"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def with_cache() -> tuple[Any, list[str], list[Tensor]]:
    """A net whose frozen part keeps its outputs, what it shares, and the inputs its stem has run on."""
    model = age(SmallNet())
    names = shared("mobiletl", model, IMAGES, cache=True)
    ran: list[Tensor] = []
    model.stem[0].register_forward_pre_hook(lambda _, args: ran.append(args[0]))
    return model, names, ran


def test_kept_outputs_give_the_same_round_to_the_bit_and_spare_the_frozen_part(outputs: Path) -> None:
    plain = age(SmallNet())
    names = shared("mobiletl", plain, IMAGES)
    wanted = a_round(plain, names, "mobiletl")
    for runs in (12, 0):
        model, names, ran = with_cache()
        found = a_round(model, names, "mobiletl", cache=True)
        assert len(ran) == runs
        assert found.train_loss == wanted.train_loss
        assert all(torch.equal(found.delta[name], wanted.delta[name]) for name in names)
    assert len(files(outputs)) == 12


def test_other_pixels_other_weights_and_damaged_files_are_computed_anew(outputs: Path) -> None:
    batch = pictures(2)
    model, _, ran = with_cache()
    wanted = logits(model, batch)
    assert torch.equal(logits(model, batch), wanted)
    assert len(ran) == 2
    files(outputs)[0].write_bytes(b"cut short")
    assert torch.equal(logits(model, batch), wanted)
    assert len(ran) == 3
    logits(model, {**batch, "pixel_values": batch["pixel_values"] + 1e-6})
    assert len(ran) == 5
    other = age(SmallNet(), seed=1)
    shared("mobiletl", other, IMAGES, cache=True)
    assert len({file.parent for file in files(outputs)}) == 1
    logits(other, batch)
    assert len({file.parent for file in files(outputs)}) == 2
