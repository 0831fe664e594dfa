"""The weights that are stored as [in, out]: those of transformers' Conv1D.

PEFT corrects ``fan_in_fan_out`` for each module when it loads an adapter, but saves the value of the last module. For a
square weight, the shape does not show the mistake.
"""

from pathlib import Path

from transformers import CONFIG_MAPPING

from fedtune.offline_merge.json_file import read_json

__all__ = ["is_transposed"]

_KINDS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_transposed(folder: Path, module: str, said: bool) -> bool:
    """Whether a module is a Conv1D. For a model type that transformers lacks, the adapter's setting decides."""
    kind = str(read_json(folder / "config.json").get("model_type"))
    if kind not in CONFIG_MAPPING:
        return said
    return kind in _KINDS and module.rpartition(".")[2] in _MODULES
