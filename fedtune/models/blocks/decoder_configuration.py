"""The shape of a decoder from its configuration: Llama, Mistral and Qwen2, which differ in biases and windows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedtune.models.blocks.activations import ACTIVATIONS
from fedtune.models.blocks.block_model import BlockConfiguration
from fedtune.models.blocks.configuration import ConfigurationReader, UnknownBlocksError
from fedtune.models.blocks.decoder import DecoderShape
from fedtune.models.blocks.rotary import RotarySettings

__all__ = ["DECODERS", "read_decoder_shape"]


@dataclass(frozen=True)
class _Family:
    """What transformers' classes of a ``model_type`` have built in, and the defaults of their configuration."""

    vocab_size: int = 32_000
    intermediate_size: int = 11_008
    positions: int = 2048
    key_heads: int | None = None
    has_bias_settings: bool = False
    has_query_bias: bool = False
    window: int | None = None
    switches_window: bool = False


DECODERS: Mapping[str, _Family] = {
    "llama": _Family(has_bias_settings=True),
    "mistral": _Family(intermediate_size=14_336, positions=4096 * 32, key_heads=8, window=4096),
    "qwen2": _Family(151_936, 22_016, 32_768, 32, has_query_bias=True, switches_window=True),
}
"""By ``model_type``."""


def read_decoder_shape(settings: Mapping[str, Any]) -> DecoderShape:
    """Return the shape that a ``config.json`` describes; UnknownBlocksError for what is not known here."""
    kind, reader = str(settings["model_type"]), ConfigurationReader(settings)
    family = DECODERS[kind]
    config = BlockConfiguration(
        kind,
        reader.take_value("vocab_size", family.vocab_size),
        reader.take_value("hidden_size", 4096),
        reader.take_value("max_position_embeddings", family.positions),
        reader.take_optional("pad_token_id"),
    )
    heads, key_heads = (
        reader.take_value("num_attention_heads", 32),
        reader.take_optional("num_key_value_heads", family.key_heads),
    )
    key_heads = key_heads or heads
    reader.require_value("num_key_value_heads", heads % key_heads == 0, key_heads)
    reader.require_value("hidden_size", config.hidden_size % heads == 0, config.hidden_size)
    activation = reader.take_value("hidden_act", "silu")
    reader.require_value("hidden_act", activation in ACTIVATIONS, activation)
    biases = family.has_bias_settings and reader.take_value("attention_bias", False)
    shape = DecoderShape(
        config,
        intermediate_size=reader.take_value("intermediate_size", family.intermediate_size),
        num_blocks=reader.take_value("num_hidden_layers", 32),
        num_heads=heads,
        num_key_heads=key_heads,
        rotary=_read_rotary(reader, config, heads),
        activation=activation,
        norm_eps=reader.take_value("rms_norm_eps", 1e-6),
        has_query_bias=biases or family.has_query_bias,
        has_output_bias=biases,
        has_mlp_bias=family.has_bias_settings and reader.take_value("mlp_bias", False),
        attention_dropout=reader.take_value("attention_dropout", 0.0),
        window=_read_window(reader, family),
        is_head_tied=reader.take_value("tie_word_embeddings", False),
    )
    reader.refuse_unread_keys()
    return shape


def _read_window(reader: ConfigurationReader, family: _Family) -> int | None:
    """The number of keys that a query sees."""
    if family.switches_window:
        switched = reader.take_value("use_sliding_window", False)
        reader.require_value("use_sliding_window", not switched, switched)
        kinds = reader.take_list("layer_types")
        reader.require_value("layer_types", set(kinds) <= {"full_attention"}, kinds)
        for unused in ("sliding_window", "max_window_layers"):
            reader.take_optional(unused)
        return None
    window = reader.take_optional("sliding_window", family.window) if family.window is not None else None
    reader.require_value("sliding_window", window is None or window > 1, window)
    return window


def _read_rotary(reader: ConfigurationReader, config: BlockConfiguration, heads: int) -> RotarySettings:
    """The frequencies of positions, in the words of transformers 4 or 5."""
    head_size = reader.take_optional("head_dim") or config.hidden_size // heads
    reader.require_value("head_dim", head_size % 2 == 0, head_size)
    theta = reader.take_value("rope_theta", 10_000.0)
    old, new = reader.take_settings("rope_scaling"), reader.take_settings("rope_parameters")
    inner = old or new
    if inner is None:
        return RotarySettings(theta, head_size)
    kind = inner.take_value("type", "default")
    kind = inner.take_value("rope_type", kind)
    plain = RotarySettings(inner.take_value("rope_theta", theta), head_size)
    if kind not in _SCALINGS:
        raise UnknownBlocksError(f"it scales its positions by {kind}")
    settings = _SCALINGS[kind](inner, plain, config)
    inner.refuse_unread_keys(frozenset(), {})
    return settings


def _scale_linearly(reader: ConfigurationReader, plain: RotarySettings, _: BlockConfiguration) -> RotarySettings:
    factor = reader.take_value("factor", 0.0)
    reader.require_value("factor", factor > 0, factor)
    return replace(plain, kind="linear", factor=factor)


def _scale_as_llama3(reader: ConfigurationReader, plain: RotarySettings, config: BlockConfiguration) -> RotarySettings:
    low, high = reader.take_value("low_freq_factor", 0.0), reader.take_value("high_freq_factor", 0.0)
    reader.require_value("high_freq_factor", high > low > 0, high)
    known = reader.take_value("original_max_position_embeddings", config.max_position_embeddings)
    scaled = replace(_scale_linearly(reader, plain, config), kind="llama3", original_positions=known)
    return replace(scaled, low_freq_factor=low, high_freq_factor=high)


_SCALINGS: Mapping[str, Callable[[ConfigurationReader, RotarySettings, BlockConfiguration], RotarySettings]] = {
    "default": lambda _, plain, __: plain,
    "linear": _scale_linearly,
    "llama3": _scale_as_llama3,
}
"""By ``rope_type``."""
