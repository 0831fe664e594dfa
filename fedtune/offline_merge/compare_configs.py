"""Compare the config.json of models. Models of one architecture may compute different functions of the same tensors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import ModelError
from fedtune.offline_merge.json_file import read_json

__all__ = ["check_settings"]

_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "n_heads", "head_dim", "num_kv_heads")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
_ALIKE = ({"silu", "swish"}, {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu"})
_HARMLESS = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "architectures",
        "id2label",
        "label2id",
        "num_labels",
        "use_cache",
        "tie_word_embeddings",
        "problem_type",
        "finetuning_task",
        "gradient_checkpointing",
        "return_dict",
        "torchscript",
        "pruned_heads",
        "auto_map",
        "task_specific_params",
        "prefix",
        "chunk_size_feed_forward",
        "is_decoder",
        "add_cross_attention",
        "bad_words_ids",
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "seq_length",
        "model_max_length",
        "pretraining_tp",
        "attn_implementation",
        "_attn_implementation",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "tokenizer_class",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "aux_loss_alpha",
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "n_layers",
        "vocab_size",
        "vocab_size_per_layer_input",
    ]
)
"""Settings that may differ without an effect on tensors, or that are compared elsewhere, such as sizes and tokens."""
_NOT_OF_THE_FUNCTION = ("drop", "initializer", "_token_id", "_token_ids", "_token_index", "unsloth", "quantization")
_OUTPUTS = "output_"


def check_settings(models: Mapping[str, Path]) -> list[str]:
    """Return a sentence for each model whose settings change the function that the first model computes.

    Raises ModelError if the tensors themselves mean something else: another number of heads, or another activation.
    """
    (first, folder), *others = models.items()
    return [said for name, other in others if (said := _difference(first, folder, name, other)) is not None]


def _difference(first: str, one: Path, name: str, other: Path) -> str | None:
    found = _differing(read_json(one / "config.json"), read_json(other / "config.json"))
    if found:  # perhaps one file omits a default, so fill in transformers' defaults
        found = _differing(*_completed(one, other))
    for key, (ours, theirs) in found.items():
        if _last(key) in _HEADS or (_last(key) in _ACTIVATIONS and not _same_activation(ours, theirs)):
            raise ModelError(
                f"{name} has {key} {theirs} in config.json, but {first} {ours}, so that the same weights mean another "
                "function; only models of one architecture merge"
            )
    if not found:
        return None
    told = ", ".join(f"{key} ({theirs}, not {ours})" for key, (ours, theirs) in found.items())
    return f"config.json of {name} differs from that of {first} in {told}; the result has the latter's"


def _completed(one: Path, other: Path) -> Sequence[Mapping[str, Any]]:
    """Fill both settings with transformers' defaults. Do not change those of a model type that transformers lacks."""
    from transformers import AutoConfig  # seconds, so only where files differ

    from fedtune.models.transformers_logging import silence_transformers

    try:
        with silence_transformers():
            return [AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict() for folder in (one, other)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        first, second = (dict(_flat(read_json(folder / "config.json"))) for folder in (one, other))
        return [
            {key: value for key, value in each.items() if key in first and key in second} for each in (first, second)
        ]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ, by dotted key."""
    first, second = dict(_flat(one)), dict(_flat(other))
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key) and _matters(key)]
    return {key: (first.get(key), second.get(key)) for key in keys}


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and key not in _HARMLESS and not _is_noise(key):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _matters(key: str) -> bool:
    last = _last(key)
    return last not in _HARMLESS and not last.startswith(_OUTPUTS) and not _is_noise(last)


def _is_noise(key: str) -> bool:
    return any(word in key for word in _NOT_OF_THE_FUNCTION)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _same_activation(one: Any, other: Any) -> bool:
    return any({one, other} <= names for names in _ALIKE)
