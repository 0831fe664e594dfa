"""Tables of the permutable axes of published transformers by tensor name: BERT, RoBERTa, GPT-2 and Llama.

All are exact. One permutation for the residual stream through all layers; the hidden units of each MLP; the heads of
each attention layer (see ``HeadLayout``). The vocabulary stays. Words in the tables, one per axis: ``stream``,
``hidden``, ``pooled``, parts of heads, ``qkv`` for the three in a row, ``-`` for none.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fedtune.errors import ModelError
from fedtune.merging.align.rebasin._permutations import (
    HeadLayout,
    PermutationKind,
    PermutationSpec,
    PermutedAxis,
    UnitLayout,
)

__all__ = ["build_spec_from_tables", "has_architecture_table"]

AxisTable = Mapping[str, str]


class _Family(NamedTuple):
    layer: str
    """A pattern of the names before a layer's own."""
    inside: AxisTable
    outside: AxisTable
    heads: Callable[[Any], HeadLayout]
    hidden: Callable[[Any], int]


def _linear(name: str, outputs: str, inputs: str) -> AxisTable:
    return {f"{name}.weight": f"{outputs} {inputs}", f"{name}.bias": outputs}


def _transposed(name: str, inputs: str, outputs: str) -> AxisTable:
    return {f"{name}.weight": f"{inputs} {outputs}", f"{name}.bias": outputs}


def _norm(name: str) -> AxisTable:
    return {f"{name}.weight": "stream", f"{name}.bias": "stream"}


def _plain_heads(config: Any) -> HeadLayout:
    width = config.hidden_size // config.num_attention_heads
    return HeadLayout(config.num_attention_heads, 1, width, width, is_rotary=False)


def _rotary_heads(config: Any) -> HeadLayout:
    groups = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadLayout(groups, config.num_attention_heads // groups, width, width, is_rotary=True)


_BERT = _Family(
    layer=r"(?:\w+\.)?encoder\.layer\.\d+",
    inside={
        **_linear("attention.self.query", "q", "stream"),
        **_linear("attention.self.key", "k", "stream"),
        **_linear("attention.self.value", "v", "stream"),
        **_linear("attention.output.dense", "stream", "o"),
        **_norm("attention.output.LayerNorm"),
        **_linear("intermediate.dense", "hidden", "stream"),
        **_linear("output.dense", "stream", "hidden"),
        **_norm("output.LayerNorm"),
    },
    outside={
        "embeddings.word_embeddings.weight": "- stream",
        "embeddings.position_embeddings.weight": "- stream",
        "embeddings.token_type_embeddings.weight": "- stream",
        **_norm("embeddings.LayerNorm"),
        **_linear("pooler.dense", "pooled", "stream"),
        **_linear("classifier.dense", "pooled", "stream"),
        **_linear("classifier.out_proj", "-", "pooled"),
        **_linear("classifier", "-", "pooled"),
    },
    heads=_plain_heads,
    hidden=lambda config: int(config.intermediate_size),
)
_GPT2 = _Family(
    layer=r"(?:transformer\.)?h\.\d+",
    inside={
        **_norm("ln_1"),
        **_transposed("attn.c_attn", "stream", "qkv"),
        **_transposed("attn.c_proj", "o", "stream"),
        **_norm("ln_2"),
        **_transposed("mlp.c_fc", "stream", "hidden"),
        **_transposed("mlp.c_proj", "hidden", "stream"),
    },
    outside={
        "wte.weight": "- stream",
        "wpe.weight": "- stream",
        **_norm("ln_f"),
        **_linear("lm_head", "-", "stream"),
        **_linear("score", "-", "stream"),
    },
    heads=_plain_heads,
    hidden=lambda config: int(config.n_inner or 4 * config.n_embd),
)
_LLAMA = _Family(
    layer=r"(?:model\.)?layers\.\d+",
    inside={
        **_norm("input_layernorm"),
        **_linear("self_attn.q_proj", "q", "stream"),
        **_linear("self_attn.k_proj", "k", "stream"),
        **_linear("self_attn.v_proj", "v", "stream"),
        **_linear("self_attn.o_proj", "stream", "o"),
        **_norm("post_attention_layernorm"),
        **_linear("mlp.gate_proj", "hidden", "stream"),
        **_linear("mlp.up_proj", "hidden", "stream"),
        **_linear("mlp.down_proj", "stream", "hidden"),
    },
    outside={
        "embed_tokens.weight": "- stream",
        **_norm("norm"),
        **_linear("lm_head", "-", "stream"),
        **_linear("score", "-", "stream"),
    },
    heads=_rotary_heads,
    hidden=lambda config: int(config.intermediate_size),
)
_FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
_PREFIXES = ("bert.", "roberta.", "transformer.", "model.")


def has_architecture_table(model: nn.Module) -> bool:
    """Whether a model is of a family in the tables."""
    return _model_type(model) in _FAMILIES


def build_spec_from_tables(model: nn.Module) -> PermutationSpec:
    """The symmetry of a transformer; ModelError names the first tensor that the tables do not have."""
    family, config = _FAMILIES[_model_type(model)], model.config
    names = list(model.state_dict())
    axes = {name: _axes(family, name) for name in names}
    if not any(axis and axis.permutation == "pooled" and at == 0 for of in axes.values() for at, axis in enumerate(of)):
        axes = {name: tuple(_unpooled(axis) for axis in of) for name, of in axes.items()}
    return PermutationSpec(
        axes, {axis.permutation: _kind(family, config, axis.permutation) for axis in _list_axes(axes)}
    )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _axes(family: _Family, name: str) -> tuple[PermutedAxis | None, ...]:
    layer = re.match(rf"({family.layer})\.", name)
    rest = name[layer.end() :] if layer else next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
    words = (family.inside if layer else family.outside).get(rest)
    if words is None:
        raise ModelError(f"rebasin: it does not know what {name!r} does in this model; leave rebasin out")
    return tuple(_axis(word, layer.group(1) if layer else "") for word in words.split())


def _axis(word: str, layer: str) -> PermutedAxis | None:
    if word in ("q", "k", "v", "o", "qkv"):
        return PermutedAxis(f"{layer}.heads", tuple(word))
    return None if word == "-" else PermutedAxis(f"{layer}.hidden" if word == "hidden" else word)


def _unpooled(axis: PermutedAxis | None) -> PermutedAxis | None:
    """A classifier without a pooler before it reads the stream."""
    return PermutedAxis("stream") if axis and axis.permutation == "pooled" else axis


def _list_axes(axes: Mapping[str, tuple[PermutedAxis | None, ...]]) -> list[PermutedAxis]:
    return [axis for of in axes.values() for axis in of if axis]


def _kind(family: _Family, config: Any, permutation: str) -> PermutationKind:
    if permutation.endswith(".heads"):
        return family.heads(config)
    return UnitLayout(family.hidden(config) if permutation.endswith(".hidden") else int(config.hidden_size))
