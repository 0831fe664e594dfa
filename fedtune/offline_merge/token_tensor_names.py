"""The tensors that have one row per token, by transformers' names for them, and those that may be tied."""

from pathlib import Path

from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.layer_names import parse_layer_name

__all__ = ["is_embedding", "is_of_columns", "is_of_tokens", "is_output", "looks_like_tokens", "output_of"]

_EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "word_embedding.weight",
    "wte.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "tokens_embed.weight",
    "shared.weight",
    "embeddings.weight",
)
_OUTPUTS = (
    "lm_head.weight",
    "embed_out.weight",
    "decoder.weight",
    "vocab_projector.weight",
    "generator_lm_head.weight",
    "lm_loss.weight",
    "proj_out.weight",
)
_BIASES = (
    "lm_head.bias",
    "predictions.bias",
    "decoder.bias",
    "vocab_projector.bias",
    "generator_lm_head.bias",
    "lm_loss.bias",
)
_COLUMNS = ("final_logits_bias",)
_RWKV_OUTPUT = "head.weight"
"""RWKV's output layer. As a part of a longer name, it is another head."""
_OUTPUT_OF = {
    "rwkv": _RWKV_OUTPUT,
    "bert": "cls.predictions.decoder.weight",
    "deberta": "cls.predictions.decoder.weight",
    "deberta-v2": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
    "xlm-roberta": "lm_head.decoder.weight",
    "mpnet": "lm_head.decoder.weight",
    "distilbert": "vocab_projector.weight",
    "modernbert": "decoder.weight",
}
"""The output layer by model_type; all others call it lm_head."""
_WITH_OUTPUT = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


def is_of_tokens(name: str) -> bool:
    """Whether a tensor has one row per token."""
    return is_embedding(name) or is_output(name) or _ends(name, _BIASES)


def is_of_columns(name: str) -> bool:
    """Whether a tensor has one column per token."""
    return _ends(name, _COLUMNS)


def is_embedding(name: str) -> bool:
    """Whether a tensor is the input embedding."""
    return _ends(name, _EMBEDDINGS)


def is_output(name: str) -> bool:
    """Whether a tensor is the output embedding."""
    return name == _RWKV_OUTPUT or _ends(name, _OUTPUTS)


def looks_like_tokens(name: str, shape: tuple[int, ...], rows: int) -> bool:
    """Whether an unknown tensor outside the layers has one axis as long as the vocabulary."""
    return parse_layer_name(name) is None and rows in shape[:2] and not is_of_tokens(name) and "position" not in name


def output_of(folder: Path) -> str | None:
    """Return the name of a model's output layer, or None."""
    settings = read_json(folder / "config.json")
    if not any(str(name).endswith(_WITH_OUTPUT) for name in settings.get("architectures") or ()):
        return None
    return _OUTPUT_OF.get(str(settings.get("model_type")), "lm_head.weight")


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)
