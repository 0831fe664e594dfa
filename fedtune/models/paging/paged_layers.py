"""Linear layers and embeddings that read their weights from a store while they compute.

Their ``weight`` is a placeholder with the shape and type of the matrix and a memory of one number, which is not a
number: code that reads it by mistake gives nan, not a wrong result.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.errors import ModelError
from fedtune.models.paging.paged_matrix import PagedMatrix

__all__ = [
    "PagedEmbedding",
    "PagedLinear",
    "list_paged_layers",
    "make_placeholder",
    "refuse_saving_placeholders",
    "replace_paged_layers",
]


def make_placeholder(rows: int, width: int, dtype: torch.dtype) -> nn.Parameter:
    """Return a frozen parameter that stands for a matrix."""
    return nn.Parameter(torch.full((), float("nan"), dtype=dtype).expand(rows, width), requires_grad=False)


class PagedLinear(nn.Linear):
    """x W^T + b with W in a store; bit-equal to the plain layer if W is read whole. b is in memory."""

    def __init__(self, matrix: PagedMatrix, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.width, matrix.rows
        self.matrix = matrix
        self.weight = make_placeholder(matrix.rows, matrix.width, matrix.dtype)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parameter's name in nn.Linear
        """[..., in] -> [..., out]."""
        out: Tensor = _Multiply.apply(input, self.matrix, self.bias)
        return out

    def make_plain(self, weight: nn.Parameter | None = None) -> nn.Linear:
        """Return the layer with its weights in memory: those given, which another layer shares, or those read."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = weight if weight is not None else _read_parameter(self.matrix)
        plain.register_parameter("bias", self.bias)
        return plain


class PagedEmbedding(nn.Embedding):
    """Rows of W by number, of which only those that occur are read. They are never trained."""

    def __init__(self, matrix: PagedMatrix, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = matrix.rows, matrix.width, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.matrix = matrix
        self.weight = make_placeholder(matrix.rows, matrix.width, matrix.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parameter's name in nn.Embedding
        """[...] -> [..., width]."""
        numbers, places = torch.unique(input, return_inverse=True)
        if len(numbers) and not 0 <= int(numbers[0]) <= int(numbers[-1]) < self.num_embeddings:
            raise IndexError(f"index out of range: the embedding {self.matrix.name} has {self.num_embeddings} rows")
        return F.embedding(places, self.matrix.gather_rows(numbers))

    def make_plain(self, weight: nn.Parameter | None = None) -> nn.Embedding:
        """Return the layer with its weights in memory: those given, which another layer shares, or those read."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        plain.weight = weight if weight is not None else _read_parameter(self.matrix)
        return plain


def _read_parameter(matrix: PagedMatrix) -> nn.Parameter:
    return nn.Parameter(matrix.copy_whole(), requires_grad=False)


class _Multiply(torch.autograd.Function):
    """Keeps nothing for the backward pass, which reads the matrix again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PagedMatrix, bias: Tensor | None) -> Tensor:
        ctx.matrix, ctx.shape = matrix, x.shape
        if len(matrix.list_pieces()) == 1:
            [(_, _, weight)] = matrix.read_pieces()
            return F.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], matrix.rows)
        for start, end, weight in matrix.read_pieces():
            out[..., start:end] = F.linear(x, weight, None if bias is None else bias[start:end])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_out = upstream[0].reshape(-1, ctx.matrix.rows)
        by_x = _multiply_back(by_out, ctx.matrix).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return by_x, None, by_out.sum(0) if ctx.needs_input_grad[2] else None


def _multiply_back(by_out: Tensor, matrix: PagedMatrix) -> Tensor:
    """dy W, added up over pieces of rows where W is not read whole."""
    total: Tensor | None = None
    for start, end, weight in matrix.read_pieces(backwards=True):
        part = by_out[:, start:end].mm(weight)
        total = part if total is None else total.add_(part)
    assert total is not None, "a matrix has rows"
    return total


def list_paged_layers(model: nn.Module) -> Iterator[tuple[str, PagedLinear | PagedEmbedding]]:
    """Return the paged layers by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, PagedLinear | PagedEmbedding):
            yield name, layer


def replace_paged_layers(model: nn.Module) -> None:
    """Put plain layers in the place of paged ones; layers that share a matrix share a parameter."""
    read: dict[PagedMatrix, nn.Parameter] = {}
    for name, layer in list(list_paged_layers(model)):
        if layer.matrix not in read:
            read[layer.matrix] = _read_parameter(layer.matrix)
        model.set_submodule(name, layer.make_plain(read[layer.matrix]))
    if vars(model).get("save_pretrained") is _refuse_saving:
        del vars(model)["save_pretrained"]


def refuse_saving_placeholders(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` refuse as long as layers are paged."""
    vars(model)["save_pretrained"] = _refuse_saving


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ModelError(
        "the weights of this model are in a file; put them into plain layers before saving: "
        "techniques.merge_into_weights(chosen, model)"
    )
