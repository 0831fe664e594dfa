"""Read tensors with one column per token as tensors with one row per token, and back."""

from torch import Tensor

from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.token_tensor_names import is_of_columns

__all__ = ["Turned"]


class Turned(ModelReader):
    """A model with these matrices transposed. They are small and read whole."""

    def __init__(self, weights: ModelReader) -> None:
        self._weights = weights
        self.source, self.folder, self.files = weights.source, weights.folder, weights.files
        self.is_quantised, self.own_tokens = weights.is_quantised, weights.own_tokens
        self.tensor_infos = {
            name: form._replace(shape=form.shape[::-1]) if is_of_columns(name) else form
            for name, form in weights.tensor_infos.items()
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows; for a tensor with one column per token, its columns."""
        if not is_of_columns(name):
            return self._weights.rows(name, start, stop)
        return self._weights.whole(name).T[start:stop].contiguous()
