"""The features of drift signals: those of the pretrained model whatever was trained, and the lines about drift."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune import techniques
from fedtune.cli.drift_view import format_drift
from fedtune.continual import check_features_stay
from fedtune.continual._drift_features import read_features
from fedtune.errors import ModelError, RecipeError
from fedtune.models import load_model
from fedtune.recipe.schema import ModelSettings
from fedtune.tracking import ClientScore, MetricRecord, RoundRecord
from tests.federations import tiny_bert
from tests.technique_steps import LANGUAGE, TEXT, chosen, shake


def make_batches(seed: int = 0, pads: int = 2) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 20, (6, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1::2, 7 - pads :] = 0
    labels = torch.tensor([0, 1] * 3)
    return [
        {"input_ids": ids[rows], "attention_mask": mask[rows], "labels": labels[rows]}
        for rows in (slice(0, 4), slice(4, 6))
    ]


def make_bert(tmp_path: Path) -> nn.Module:
    tiny_bert(tmp_path / "bert")
    return load_model(ModelSettings(source=f"path:{tmp_path}/bert"), TEXT, ["bad", "good"], seed=0)


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


def test_features_are_those_of_the_pretrained_model_after_pairs_and_head_were_trained(tmp_path: Path) -> None:
    model, batches = make_bert(tmp_path), make_batches()
    before = read_features(model, (), 2, batches)
    lora = chosen("lora")
    names = techniques.apply_techniques(lora, model, TEXT, 0)
    check_features_stay(lora, model, 2)
    shake(model, names)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(read_features(model, lora, 2, batches), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(read_features(model, (), 2, batches), before)
    assert before.shape == (6, 16)


def test_features_of_tokens_are_means_over_real_ones() -> None:
    model, batches = make_llama(), make_batches()
    found = read_features(model, (), 0, batches)
    with torch.no_grad():
        rows = [
            hidden[mask.bool()].mean(0)
            for batch in batches
            for hidden, mask in zip(
                model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state,
                batch["attention_mask"],
                strict=True,
            )
        ]
    torch.testing.assert_close(found, torch.stack(rows))
    lora = chosen("lora")
    techniques.apply_techniques(lora, model, LANGUAGE, 0)
    check_features_stay(lora, model, 0)


@pytest.mark.parametrize("joined", ["full", "bias"])
def test_techniques_that_move_the_features_are_refused(tmp_path: Path, joined: str) -> None:
    model = make_bert(tmp_path)
    one = chosen(joined)
    techniques.apply_techniques(one, model, TEXT, 0)
    with pytest.raises(RecipeError, match=f"{joined} trains .*train head-only or lora, or drop drift"):
        check_features_stay(one, model, 2)


def test_a_shared_base_that_moves_is_refused(tmp_path: Path) -> None:
    model = make_bert(tmp_path)
    both = chosen("lora", trained_factors="both-and-base")
    techniques.apply_techniques(both, model, TEXT, 0)
    with pytest.raises(RecipeError, match="so the features would move"):
        check_features_stay(both, model, 2)


def test_a_model_without_a_last_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="has no last layer that makes logits"):
        check_features_stay((), nn.Sequential(nn.Linear(2, 2)), 0)


def make_round(number: int, client_scores: dict[int, float], **figures: float) -> RoundRecord:
    metrics = tuple(MetricRecord(split="drift", domain="all", name=name, value=one) for name, one in figures.items())
    scores = tuple(
        ClientScore(client=client, moment="before", name="drift-centred", value=value, num_predictions=32)
        for client, value in client_scores.items()
    )
    return RoundRecord(
        number=number,
        status="completed",
        reason="",
        seconds=1.0,
        client_records=(),
        metrics=metrics,
        checkpoint=None,
        client_scores=scores,
    )


def test_runs_show_names_alarms_and_clients_that_drift() -> None:
    rounds = [
        make_round(1, {}),
        make_round(2, {0: 1.0, 1: 9.0}, threshold=1.5, centred=5.0, streak=1),
        make_round(3, {0: 4.0}, threshold=1.5, centred=4.0, streak=2, opens=4),
        make_round(4, {1: 1.0}, threshold=1.75, centred=1.0, streak=0),
    ]
    assert format_drift(rounds, 2) == [
        "drift: the threshold is 1.75; alarm in round 3; a task opened after round 4",
        "client 0 drifts: 4.00 in round 3",
    ]
    assert format_drift(rounds[:1], 2) == []
    assert format_drift([], 2) == []
    many = [make_round(2, dict.fromkeys(range(8), 3.0), threshold=1.5, centred=3.0, streak=1)]
    assert format_drift(many, 2)[-1] == "3 more clients drift"
