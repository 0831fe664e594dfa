"""Which weights are stored as [in, out]: those of transformers' Conv1D, whatever an adapter says of all its modules.

PEFT corrects ``fan_in_fan_out`` module by module when it loads, and saves what the last one left behind; of a square
weight no shape tells that it is wrong.
"""

from pathlib import Path

from transformers import CONFIG_MAPPING

from fedtune.offline_merge.json_file import read_json

__all__ = ["is_transposed"]

_KINDS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_transposed(folder: Path, module: str, said: bool) -> bool:
    """Whether a module of the model in a folder is such a layer; as it is said of a model that transformers lacks."""
    kind = str(read_json(folder / "config.json").get("model_type"))
    if kind not in CONFIG_MAPPING:
        return said
    return kind in _KINDS and module.rpartition(".")[2] in _MODULES
