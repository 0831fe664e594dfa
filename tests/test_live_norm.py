"""Batch-norm statistics that are trained: on one client, and merged over several."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.merging import build_pipeline, merge_client_updates
from fedtune.recipe.schema import Unit
from fedtune.tasks import get_task
from fedtune.techniques import UnfrozenBatchNorm2d, list_trainable_tensors
from fedtune.training import get_model_state, set_model_state, set_train_mode
from fedtune.wire.client_update import ClientUpdate, pack

CHANNELS = 3


def pictures(count: int, seed: int) -> Tensor:
    """Each channel with a mean and spread of its own."""
    drawn = torch.randn(count, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor([0.5, 1.0, 3.0])[:, None, None] + seed


def norms() -> nn.Sequential:
    model = nn.Sequential(
        nn.BatchNorm2d(CHANNELS), UnfrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(CHANNELS, momentum=0.25))
    )
    model.requires_grad_(False)
    return model


def test_it_is_the_norm_it_was_made_of_in_training_and_out_of_it() -> None:
    plain = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.25)
    nn.init.normal_(plain.weight)
    twin = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.25)
    twin.load_state_dict(plain.state_dict())
    live = UnfrozenBatchNorm2d.from_batch_norm(plain)
    assert live.weight is plain.weight
    assert live.running_var is plain.running_var
    for mode in (True, False):
        assert torch.equal(live.train(mode)(pictures(2, 1)), twin.train(mode)(pictures(2, 1)))
        for name in ("running_mean", "running_var"):
            assert torch.equal(getattr(live, name), getattr(twin, name))
    assert torch.equal(live.to_plain_layer()(pictures(2, 2)), twin(pictures(2, 2)))


def test_too_small_a_batch_is_normalised_by_what_ran_before() -> None:
    live = UnfrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(CHANNELS)).train()
    few, enough = pictures(1, 3)[..., :3], pictures(2, 3)
    assert torch.equal(live(few), live.eval()(few))
    assert live.running_mean is not None
    assert torch.equal(live.running_mean, torch.zeros(CHANNELS))
    live.train()(enough)
    assert not torch.equal(live.running_mean, torch.zeros(CHANNELS))


def test_only_its_statistics_are_trained_and_follow_the_data() -> None:
    model = norms()
    names = ["1.running_mean", "1.running_var"]
    assert list_trainable_tensors(model) == names
    set_train_mode(model)
    assert [layer.training for layer in model] == [False, True]
    model(pictures(2, 4))
    before = get_model_state(model, ["0.running_mean", *names])
    assert torch.equal(before["0.running_mean"], torch.zeros(CHANNELS))
    assert not torch.equal(before["1.running_mean"], torch.zeros(CHANNELS))
    set_model_state(model, {name: tensor + 1 for name, tensor in before.items()})
    assert torch.equal(get_model_state(model, names)["1.running_var"], before["1.running_var"] + 1)


def test_it_survives_being_sent_to_another_process() -> None:
    model = pickle.loads(pickle.dumps(norms()))
    assert list_trainable_tensors(model) == ["1.running_mean", "1.running_var"]


def moments(values: Tensor) -> dict[str, Tensor]:
    by_channel = values.transpose(0, 1).flatten(1).double()
    return {
        "n.running_mean": by_channel.mean(1).float(),
        "n.running_var": by_channel.var(1, correction=0).float(),
    }


@pytest.mark.parametrize("counts", [(2, 6, 4), (1, 9)])
def test_merged_statistics_are_those_of_all_examples_pooled(tmp_path: Path, counts: tuple[int, ...]) -> None:
    data = [pictures(count, seed) for seed, count in enumerate(counts)]
    start = {"n.running_mean": torch.full((CHANNELS,), 0.3), "n.running_var": torch.ones(CHANNELS)}
    sent = []
    for client, values in enumerate(data):
        path = tmp_path / f"{client}.safetensors"
        path.write_bytes(pack({name: tensor - start[name] for name, tensor in moments(values).items()}))
        sent.append(ClientUpdate(client, len(values), path))
    merged = merge_client_updates(build_pipeline([Unit(name="mean")]), start, start, sent)
    for name, wanted in moments(torch.cat(data)).items():
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)


def test_techniques_that_train_no_statistics_send_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    shared = techniques.apply_techniques(
        techniques.build_techniques([Unit(name="full")]), model, get_task("image-classification"), 0
    )
    assert not any("running" in name for name in shared)
