"""The shape of an encoder from its configuration."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedtune.models.blocks.activations import ACTIVATIONS
from fedtune.models.blocks.block_model import BlockConfiguration
from fedtune.models.blocks.configuration import ConfigurationReader
from fedtune.models.blocks.encoder import EncoderShape

__all__ = ["ENCODERS", "read_encoder_shape"]

ENCODERS = ("bert",)
"""The values of ``model_type``."""


def read_encoder_shape(settings: Mapping[str, Any], num_labels: int, problem: str | None) -> EncoderShape:
    """Return the shape that a ``config.json`` describes, with a head for some labels."""
    reader = ConfigurationReader(settings)
    config = BlockConfiguration(
        str(settings["model_type"]),
        reader.take_value("vocab_size", 30_522),
        reader.take_value("hidden_size", 768),
        reader.take_value("max_position_embeddings", 512),
        reader.take_optional("pad_token_id", 0),
    )
    config = replace(config, num_labels=num_labels, problem_type=problem)
    heads, activation = reader.take_value("num_attention_heads", 12), reader.take_value("hidden_act", "gelu")
    reader.require_value("num_attention_heads", config.hidden_size % heads == 0, heads)
    reader.require_value("hidden_act", activation in ACTIVATIONS, activation)
    dropout = reader.take_value("hidden_dropout_prob", 0.1)
    has_own = settings.get("classifier_dropout") is not None
    shape = EncoderShape(
        config,
        intermediate_size=reader.take_value("intermediate_size", 3072),
        num_blocks=reader.take_value("num_hidden_layers", 12),
        num_heads=heads,
        num_segments=reader.take_value("type_vocab_size", 2),
        activation=activation,
        norm_eps=reader.take_value("layer_norm_eps", 1e-12),
        dropout=dropout,
        attention_dropout=reader.take_value("attention_probs_dropout_prob", 0.1),
        head_dropout=reader.take_value("classifier_dropout", dropout) if has_own else dropout,
    )
    if not has_own:
        reader.take_optional("classifier_dropout")
    reader.take_value("tie_word_embeddings", True)  # the head over the vocabulary is not built
    reader.refuse_unread_keys()
    return shape
