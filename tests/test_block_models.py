"""Models of plain blocks against those of transformers: the same names, the same order and the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneWarning
from fedtune.models.blocks.configuration import UnknownBlocksError
from tests.block_models import ask_for_step, find_differences, load_both, make_batch, save_model

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "as many keys as queries": ("llama", {"num_key_value_heads": 4}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "heads of another size": ("llama", {"head_dim": 14}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "no padding token": ("llama", {"pad_token_id": None}),
    "dropout in attention": ("llama", {"attention_dropout": 0.3}),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "linear positions": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
    "llama3 positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "window": ("mistral", {"sliding_window": 5}),
    "window of the length of the text": ("mistral", {"sliding_window": 9}),
    "no window": ("mistral", {"sliding_window": None}),
    "window by default": ("mistral", {}),
    "biases of queries": ("qwen2", {}),
    "biases of queries and a tied head": ("qwen2", {"tie_word_embeddings": True}),
}
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout everywhere": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4},
    "no dropout": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "no padding token": {"pad_token_id": None},
}


@pytest.mark.parametrize("case", DECODERS)
def test_a_decoder_has_the_bits_of_transformers(case: str, tmp_path: Path) -> None:
    kind, settings = DECODERS[case]
    found, wanted = load_both(save_model(kind, tmp_path / "base", **settings), kind)
    for form in ("whole", "padded", "packed"):
        batch = make_batch(wanted, form)
        assert find_differences(ask_for_step(found, batch), ask_for_step(wanted, batch)) == [], form


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_has_the_bits_of_transformers(case: str, tmp_path: Path) -> None:
    found, wanted = load_both(save_model("bert", tmp_path / "base", **ENCODERS[case]), "bert")
    for form in ("whole", "padded", "segments"):
        batch = make_batch(wanted, form)
        assert find_differences(ask_for_step(found, batch), ask_for_step(wanted, batch)) == [], form


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_names_types_and_order_of_all_tensors_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    found, wanted = load_both(save_model(kind, tmp_path / "base"), kind)
    for list_tensors in ("named_parameters", "named_buffers"):
        ours, theirs = ([*getattr(model, list_tensors)()] for model in (found, wanted))
        assert [(name, one.shape, one.dtype) for name, one in ours] == [(n, one.shape, one.dtype) for n, one in theirs]
        assert find_differences(dict(ours), dict(theirs)) == []
    assert list(found.state_dict()) == list(wanted.state_dict())
    assert found.training is wanted.training is False


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    ("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_weights_of_other_types_in_shards_have_the_bits_of_transformers(
    kind: str, stored: str, computed: str, tmp_path: Path
) -> None:
    folder = save_model(kind, tmp_path / "base", getattr(torch, stored), max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    found, wanted = load_both(folder, kind, dtype=computed)
    batch = make_batch(wanted)
    assert find_differences(ask_for_step(found, batch), ask_for_step(wanted, batch)) == []


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c", "d")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_head_in_the_place_of_another_is_drawn_with_the_same_bits(
    labels: tuple[str, ...], dtype: str, tmp_path: Path
) -> None:
    folder = save_model("bert", tmp_path / "base")
    with pytest.warns(FedtuneWarning, match="a head for 3 classes"):
        found, wanted = load_both(folder, "bert", labels, dtype=dtype)
    assert find_differences(dict(found.named_parameters()), dict(wanted.named_parameters())) == []
    assert found.drawn == vars(wanted)["drawn"]


def test_a_backbone_without_head_and_pooler_gets_them_with_the_same_bits(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, BertModel

    made = BertForSequenceClassification.from_pretrained(save_model("bert", tmp_path / "whole"))
    for name, pooler in (("with", True), ("without", False)):
        backbone = BertModel(made.config, add_pooling_layer=pooler)
        backbone.save_pretrained(tmp_path / name)
        found, wanted = load_both(tmp_path / name, "bert")
        assert find_differences(dict(found.named_parameters()), dict(wanted.named_parameters())) == [], name
        assert found.drawn == vars(wanted)["drawn"]
        batch = make_batch(wanted)
        assert find_differences(ask_for_step(found, batch), ask_for_step(wanted, batch)) == []


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "scales its positions by dynamic"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "scales its positions by yarn"),
        ("llama", {"hidden_act": "relu2"}, 'says hidden_act: "relu2"'),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: 30.0"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "use_sliding_window: true",
        ),
        ("bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type: "relative_key"'),
        ("bert", {"chunk_size_feed_forward": 2}, "chunk_size_feed_forward: 2"),
        ("bert", {"is_decoder": True}, "is_decoder: true"),
    ],
)
def test_what_is_not_known_is_refused_with_the_reason(
    kind: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownBlocksError, match=reason):
        load_both(save_model(kind, tmp_path / "base", **settings), kind)
