"""Tensors that a file may omit: masks and positions, which every model recomputes, and copies of tied tensors.

Older releases of transformers wrote them, and newer ones do not. Copies of one model may therefore differ in them.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from fedtune.offline_merge.readers.model_reader import ModelReader, are_same
from fedtune.offline_merge.safetensors_layout import TensorInfo
from fedtune.offline_merge.token_tensor_names import is_of_tokens, is_output

__all__ = ["without_spare"]

_MADE = ("position_ids", "token_type_ids", "rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")
_MASKS = ("attn.bias", "attention.bias")
_MASK = 4


def without_spare(models: Mapping[str, ModelReader]) -> dict[str, ModelReader]:
    """Return the models without optional tensors that one of them lacks."""
    held = [set(model.tensor_infos) for model in models.values()]
    common = set.intersection(*held)
    lacked = set.union(*held) - common
    spare = {
        name
        for name in lacked
        if all(_is_spare(model, name, common) for model in models.values() if name in model.tensor_infos)
    }
    return {
        name: _Without(model, spare) if spare & model.tensor_infos.keys() else model for name, model in models.items()
    }


def _is_spare(model: ModelReader, name: str, common: Collection[str]) -> bool:
    """Whether a tensor follows from the settings, or is a copy of a token tensor that all models have."""
    if _is_made(name, model.tensor_infos[name]):
        return True
    if not is_of_tokens(name) or is_output(name):  # an output is compared with the input where models are untied
        return False
    return any(is_of_tokens(other) and are_same(model, name, other) for other in sorted(common))


def _is_made(name: str, form: TensorInfo) -> bool:
    """Whether a tensor is a mask, which has four dimensions. A bias has one."""
    return name.endswith(_MADE) or (name.endswith(_MASKS) and len(form.shape) == _MASK)


class _Without(ModelReader):
    """A model without some of its tensors."""

    def __init__(self, model: ModelReader, names: Collection[str]) -> None:
        self.source, self.folder, self.files = model.source, model.folder, model.files
        self.is_quantised, self.own_tokens, self._model = model.is_quantised, model.own_tokens, model
        self.tensor_infos = {name: form for name, form in model.tensor_infos.items() if name not in names}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The model's rows."""
        return self._model.rows(name, start, stop)
