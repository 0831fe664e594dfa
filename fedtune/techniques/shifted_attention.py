"""Shifted short attention: train long texts with attention inside groups of tokens; score them with full attention.

What: with groups of G tokens, token i belongs to group ⌊i / G⌋ for half of the heads and to ⌊(i + G/2) / G⌋ for the
other half. Each head attends inside its groups and never ahead. The shifted heads link neighbouring groups. Scoring and
generation use the model's own, full attention.
Saves: time, as attention costs G products for each token instead of the length of the text. Where a kernel stores the
matrix of attention, it also saves memory. Kernels that do not store it need a little more memory than for full
attention, for regrouped queries, keys and values. In padded or packed rows, transformers' mask of all pairs remains.
Exactness: a text of at most G/2 tokens has the gradients of full attention. A longer one is trained as a sparser
network, whose weights fit the full one.
Sends: what the other technique sends.
Use when: texts are much longer than G; with ``model.position_interpolation`` also longer than those of pretraining. The
paper takes G as a quarter of the length.
Avoid when: texts are short, or every token must see all others in training.
Fits: causal language models with transformers' attention interface. Keys that several heads share are repeated first.
Packing: groups are those of the packed row; texts still do not see each other.
Source: Chen et al., "LongLoRA" (arXiv 2309.12307), as LongQLoRA (arXiv 2311.04879) trains it. Deviation: the authors
roll the tokens, by which the first G/2 see the last ones. Here the first and last group of shifted heads are shorter.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique

__all__ = ["ShiftedAttention", "attend_in_groups"]

_NAME, _GROUP, _BEFORE = "shifted-attention", "shifted_attention_group", "attention_before_shifting"


class ShiftedAttention(Technique):
    """Attend inside groups of tokens in training, shifted by half a group for half of the heads."""

    name: ClassVar[str] = _NAME
    fits_zeroth_order: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    has_exact_gradients: ClassVar[bool] = False
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True

    group_size: int = Field(512, ge=2, multiple_of=2, description="tokens that see each other")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Take the place of the model's attention function; ModelError for a model without the interface."""
        layers = [layer for layer in model.modules() if getattr(layer, "is_causal", False)]
        if not isinstance(model, PreTrainedModel) or task.auto_class != "AutoModelForCausalLM" or not layers:
            raise ModelError(f"{type(model).__name__} is no causal language model; remove shifted-attention")
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation("sdpa")
            model.set_attn_implementation(_NAME)
        except ValueError as error:
            raise ModelError(f"{type(model).__name__} has an attention of its own; remove shifted-attention") from error
        vars(model)[_BEFORE] = before
        for layer in layers:
            vars(layer)[_GROUP] = self.group_size

    def _fold(self, model: nn.Module) -> None:
        """Restore the model's attention function."""
        assert isinstance(model, PreTrainedModel)
        model.set_attn_implementation(vars(model).pop(_BEFORE))
        for layer in model.modules():
            vars(layer).pop(_GROUP, None)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls for attention: query [b, heads, s, d]; returns [b, s, heads, d]."""
    if not module.training:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return whole
    repeats = query.shape[1] // key.shape[1]
    states = (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    size, half = vars(module)[_GROUP], query.shape[1] // 2
    parts = [
        attend_in_groups([state[:, heads] for state in states], attention_mask, size, shift, **options)
        for heads, shift in ((slice(half), 0), (slice(half, None), size // 2))
    ]
    return torch.cat(parts, 1).transpose(1, 2).contiguous(), None


def attend_in_groups(states: Sequence[Tensor], mask: Tensor | None, size: int, shift: int, **options: Any) -> Tensor:
    """Causal attention [b, heads, s, d] inside the groups ⌊(i + shift) / size⌋.

    ``states`` are queries, keys and values; ``mask`` [b, 1, s, s] says who may see whom; of the options only
    ``dropout`` and ``scaling`` count.
    """
    spans = _list_spans(states[0].shape[2], size, shift)
    given: dict[str, Any] = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    return torch.cat([_attend_in_span(states, mask, *span, **given) for span in spans], 2)


def _list_spans(length: int, size: int, shift: int) -> list[tuple[int, int, int]]:
    """Start, stop and group size of up to three spans: a shorter first group, whole groups, a shorter last one."""
    first = min(size - shift, length) if shift else 0
    whole = first + (length - first) // size * size
    spans = [(0, first, first), (first, whole, size), (whole, length, length - whole)]
    return [span for span in spans if span[0] < span[1]]


def _attend_in_span(
    states: Sequence[Tensor], mask: Tensor | None, start: int, stop: int, size: int, **given: Any
) -> Tensor:
    """Groups of one size in a row, as so many batches: the form that torch has kernels of little memory for."""
    batch = len(states[0])
    query, key, value = (
        state[:, :, start:stop].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for state in states
    )
    if mask is not None:
        given["attn_mask"] = _group_mask(mask[:, :, start:stop, start:stop].expand(batch, -1, -1, -1), size)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=mask is None, **given)
    joined: Tensor = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return joined


def _group_mask(mask: Tensor, size: int) -> Tensor:
    """[b x groups, 1, size, size]: who may see whom inside each group; a place that sees nobody sees itself."""
    blocks = mask.unflatten(2, (-1, size)).unflatten(4, (-1, size)).diagonal(dim1=2, dim2=4)
    itself = torch.eye(size, dtype=torch.bool, device=mask.device)
    return torch.logical_or(blocks.movedim(-1, 1).flatten(0, 1), itself)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
