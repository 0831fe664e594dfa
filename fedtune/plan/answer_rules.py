"""What each function of the product is told when it asks a tensor without data.

The answers are those of the usual step, in which every token counts. Where the data decides, the answer is the one that
needs the most memory.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RULES", "Question", "QuestionOperands", "Rule"]


class Question(NamedTuple):
    """What is asked, and the function that asks."""

    kind: str
    asker: str


class QuestionOperands(NamedTuple):
    """The arguments of the operation, and the local variables of the function that asks."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: Mapping[str, Any]


Rule = Callable[[QuestionOperands], Any]
"""Returns the answer."""


def _always(value: Any) -> Rule:
    return lambda _: value


def _all_entries(asked: QuestionOperands) -> Tensor:
    """The positions of all entries: an upper bound, exact if each token counts."""
    tensor: Tensor = asked.args[0]
    return torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64)


def _kept_places(asked: QuestionOperands) -> Tensor:
    """The positions of the ``keep`` entries of each row."""
    return torch.empty(len(asked.args[0]) * int(asked.names["keep"]), asked.args[0].dim(), dtype=torch.int64)


def _kept_values(asked: QuestionOperands) -> Tensor:
    """The ``keep`` entries of each row."""
    tensor: Tensor = asked.args[0]
    return tensor.new_empty(len(tensor) * int(asked.names["keep"]))


def _everything_under_mask(asked: QuestionOperands) -> Tensor:
    tensor, [mask, *_] = asked.args
    size: tuple[int, ...] = (mask.numel(), *tensor.shape[mask.dim() :])
    return torch.empty(size, dtype=tensor.dtype)


def _active_entries(asked: QuestionOperands) -> int:
    """As many entries of a mask as its model has on average."""
    return int(asked.names["self"].density * asked.names["mask"].numel())


def _empty_bins(asked: QuestionOperands) -> Tensor:
    """As many bins as ``minlength``."""
    given = [one for one in (*asked.args[1:], *asked.kwargs.values()) if isinstance(one, int)]
    return torch.empty(max(given, default=1), dtype=torch.int64)


_TECHNIQUES = "fedtune.techniques"
_ASKED: tuple[tuple[str, str, Rule], ...] = (
    ("meft._blocks._is_close", "bool", _always(True)),
    ("meft._two_streams.draw_dropout_seed", "int", _always(0)),
    ("meft._two_streams.ReversibleStack._returns", "equal", _always(True)),
    ("meft._reversible._compute_checksums", "int", _always(0)),
    ("meft._reversible._compute_error", "float", _always(0.0)),
    ("meft.meft._count_range_bits", "float", _always(1.0)),
    ("deft._density_probe.DensityStep.begin_step", "bool", _always(True)),
    ("deft._density_probe.DensityProbe.on_down_projection_input", "equal", _always(True)),
    ("deft._density_probe.DensityProbe._emit", "float", _always(1.0)),
    ("deft._activation_density.estimate_activation_scale", "float", _always(1.0)),
    ("deft._activation_density._WithDensity.backward", "float", _always(1.0)),
    ("deft._mlp_weights.MlpWeights.current_weight", "float", _always(1.0)),
    ("fused_loss._chunked_loss.fused_cross_entropy", "nonzero", _all_entries),
    ("fused_loss._chunked_loss._scale_gradient", "bool", _always(True)),
    ("error_norm_truncation._compute_error_norms", "nonzero", _all_entries),
    ("_filtered_loss.FilteredLoss.__call__", "equal", _always(True)),
    ("pruning._pruned_tensor.pack_pruned", "masked_select", _kept_values),
    ("pruning._pruned_tensor._places", "nonzero", _kept_places),
    ("pruning._pruned_tensor._narrow", "bool", _always(True)),
    ("pruning.dynamic_pruning.DynamicPruning._count_swaps", "int", _active_entries),
    ("pruning._largest_entries._of_long_row", "int", _always(0)),
    ("pruning._largest_entries._bound", "int", _always(0)),
    ("pruning._largest_entries._bound", "mask_index", _everything_under_mask),
    ("pruning._largest_entries._bound", "bincount", _empty_bins),
)
_MASKS = ("make_padding_mask", "make_causal_mask", "_number_texts")
RULES: dict[Question, Rule] = {Question(kind, f"{_TECHNIQUES}.{asker}"): rule for asker, kind, rule in _ASKED} | {
    **{Question("bool", f"fedtune.models.blocks.attention.{name}"): _always(True) for name in _MASKS},
    Question("bool", "transformers.masking_utils._ignore_bidirectional_mask_sdpa"): _always(True),
    Question("bool", "transformers.masking_utils._ignore_causal_mask_sdpa"): _always(True),
    Question("bool", "transformers.masking_utils.find_packed_sequence_indices"): _always(True),
}
"""The answer to each question that the product's code is known to ask."""
