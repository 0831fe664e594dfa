"""Choose the blocks of tokens that attend to each other most, and run a transformer block on them alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TokenChoice", "choose_tokens", "find_real_tokens", "run_on_tokens", "score_blocks"]


class TokenChoice(NamedTuple):
    """How tokens are chosen. ``mask`` [n, tokens] is 0 for padding; None without padding."""

    fraction: float
    size: int
    mask: Tensor | None


def find_real_tokens(mask: Tensor | None) -> Tensor | None:
    """Return which tokens [n, tokens] are no padding, from the mask of a block's attention; None if all are real.

    A mask [n, tokens] says it itself. In one of [n, heads, tokens, tokens], which may be added to the scores, no token
    attends to padding.
    """
    if mask is None or mask.dim() == 2:
        return mask
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.any(2).any(1)


def score_blocks(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the informativeness [n, blocks] of blocks, from mean queries and keys [n, heads, blocks, d].

    It is the sum over heads and over the pairs (i, j) that contain the block, j <= i, of the positive part of q_i k_j.
    """
    pairs = (queries @ keys.transpose(-1, -2)).clamp(min=0).sum(1).tril()
    return (pairs + pairs.tril(-1).transpose(-1, -2)).sum(-1)


@torch.no_grad()
def choose_tokens(block: nn.Module, hidden: Tensor, choice: TokenChoice) -> Tensor | None:
    """Return the positions [n, kept] in order; None if all tokens are kept.

    Whole blocks are chosen in each text. The tokens behind the last whole block are always kept. A block of padding is
    kept only if a text has too few others.
    """
    whole = hidden.shape[1] // choice.size
    count = -int(-choice.fraction * whole // 1)
    if whole < 2 or count >= whole:
        return None
    means, empty = _average(hidden, choice, whole)
    padding = -1.0 - torch.arange(whole, device=hidden.device)
    scores = torch.where(empty, padding, score_blocks(*_project(block, means)).float())
    chosen = scores.topk(count, 1).indices.sort(1).values
    within = torch.arange(choice.size, device=hidden.device)
    places = (chosen[..., None] * choice.size + within).flatten(1)
    rest = torch.arange(whole * choice.size, hidden.shape[1], device=hidden.device)
    return torch.cat([places, rest.expand(len(hidden), -1)], 1)


def _average(hidden: Tensor, choice: TokenChoice, whole: int) -> tuple[Tensor, Tensor]:
    """Return the mean state [n, blocks, h] of the tokens of each block that are no padding, and which have none."""
    blocks = hidden[:, : whole * choice.size].unflatten(1, (whole, choice.size))
    if choice.mask is None:
        return blocks.mean(2), torch.zeros(blocks.shape[:2], dtype=torch.bool, device=hidden.device)
    real = choice.mask[:, : whole * choice.size].unflatten(1, (whole, choice.size)).to(hidden.dtype)
    counts = real.sum(2)
    return (blocks * real[..., None]).sum(2) / counts.clamp(min=1)[..., None], counts == 0


def _project(block: Any, means: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys [n, heads, blocks, d] of mean states, without positions."""
    attention = block.self_attn
    states = block.input_layernorm(means)
    size = int(attention.head_dim)
    queries, keys = (
        project(states).unflatten(-1, (-1, size)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj)
    )
    return queries, keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)


def run_on_tokens(run: Any, hidden: Tensor, kept: Tensor, given: dict[str, Any]) -> Any:
    """Run a block on the kept tokens, with their own positions. Other tokens pass it unchanged."""
    index = kept[..., None].expand(-1, -1, hidden.shape[-1])
    out = run(hidden.gather(1, index), **{name: _select(name, one, kept) for name, one in given.items()})
    return hidden.scatter(1, index, out[0] if isinstance(out, tuple) else out)


def _select(name: str, value: Any, kept: Tensor) -> Any:
    """Return what belongs to the kept tokens of an argument. A cache is no use in training."""
    if name in ("cache", "past_key_values"):
        return None
    if name == "position_embeddings" and value is not None:
        return tuple(_select_rows(one, kept) for one in value)
    if value is not None and (name == "position_ids" or (name == "attention_mask" and value.dim() == 2)):
        return value.expand(len(kept), -1).gather(1, kept)
    if name == "attention_mask" and value is not None:
        rows = kept[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[-1])
        columns = kept[:, None, None, :].expand(-1, value.shape[1], kept.shape[1], -1)
        return value.expand(len(kept), -1, -1, -1).gather(2, rows).gather(3, columns)
    return value


def _select_rows(table: Tensor, kept: Tensor) -> Tensor:
    """[1 or n, tokens, d] -> [n, kept, d]."""
    wide = table.expand(len(kept), -1, -1)
    return wide.gather(1, kept[..., None].expand(-1, -1, table.shape[-1]))
