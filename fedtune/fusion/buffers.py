"""What older releases of transformers wrote beside the weights though every model makes it anew: masks, positions.

Some copies of one model hold such a tensor and others do not, which is no difference between the models.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from fedtune.fusion.layout import Form
from fedtune.fusion.weights import Weights

__all__ = ["without_buffers"]

_MADE = ("position_ids", "token_type_ids", "rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")
_MASKS = ("attn.bias", "attention.bias")
_MASK = 4


def without_buffers(models: Mapping[str, Weights]) -> dict[str, Weights]:
    """The models, each without such tensors as one of the others lacks."""
    found = {name for model in models.values() for name, form in model.forms.items() if _is_made(name, form)}
    lacked = {name for name in found if any(name not in model.forms for model in models.values())}
    return {name: _Without(model, lacked) if lacked & model.forms.keys() else model for name, model in models.items()}


def _is_made(name: str, form: Form) -> bool:
    """Whether a tensor follows from the model's settings; a mask has four dimensions where a bias has one."""
    return name.endswith(_MADE) or (name.endswith(_MASKS) and len(form.shape) == _MASK)


class _Without(Weights):
    """A model without some of its tensors."""

    def __init__(self, model: Weights, names: Collection[str]) -> None:
        self.origin, self.folder, self.files = model.origin, model.folder, model.files
        self.quantised, self.own_tokens, self._model = model.quantised, model.own_tokens, model
        self.forms = {name: form for name, form in model.forms.items() if name not in names}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The model's rows."""
        return self._model.rows(name, start, stop)
