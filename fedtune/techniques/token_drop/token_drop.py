"""Token drop: the upper blocks of a language model run only on the tokens that attend to each other most.

What: in each block between ``first_share`` of the depth and the last one, tokens are scored in groups of
``group_size``. The score of a group is the sum over heads and pairs of groups of the positive part of q·k, with q and k
of the mean state of each group. The best ``kept_fraction`` of the groups of a text, in order and with their own
positions, pass the block. Other tokens skip it: their state stays as it is. The tokens behind the last whole group are
kept. Groups of padding are dropped first.
Saves: in such a block, activations of all kinds in proportion to the dropped tokens, and time.
Costs: a gather and a scatter for each such block. Texts are scored with all tokens, so training and scoring differ.
Sends: what the other technique sends.
Error: gradients are approximate, and so is the loss of a training step. The choice in a block looks at later tokens:
that is acceptable in training, and not used elsewhere.
Use when: texts are long (the paper: 4096 tokens and more) and redundant.
Avoid when: texts are shorter than a few groups, since nothing is dropped then. Also avoid it for text with little
redundancy, such as code.
Fits: decoders of Llama's kind: ``self_attn`` with ``q_proj`` and ``k_proj``, after ``input_layernorm``.
Source: "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning" (arXiv 2501.09767), section 3.1, equation
2, the informativeness of tokens, and its setting for Llama with the upper half of the layers sparse. Deviations: this
is a cheap variant. Scores are exact on means of groups, where the paper trains a predictor and pools the scores of all
tokens. One choice serves attention and MLP. One fraction serves all such layers, where the paper profiles a threshold
for each. Kernels are the usual ones.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique
from fedtune.techniques.token_drop._token_blocks import TokenChoice, choose_tokens, find_real_tokens, run_on_tokens

__all__ = ["TokenDrop"]


class TokenDrop(Technique):
    """Run the upper blocks on some tokens."""

    name: ClassVar[str] = "token-drop"
    has_exact_gradients: ClassVar[bool] = False
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    paged_base_problem: ClassVar[str | None] = None
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "deft": "densities are measured over all tokens of a step at once",
        "meft": "reversible blocks do not run on a part of the tokens",
        "shifted-attention": "both decide which tokens attend to each other",
    }

    kept_fraction: float = Field(0.5, gt=0, le=1, description="share of the groups that pass a block")
    group_size: int = Field(64, ge=1, description="tokens that are kept or dropped together")
    first_share: float = Field(0.5, ge=0, le=1, description="share of the blocks, from the first, that run on all")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Replace the forward pass of the upper blocks; ModelError for a model of another kind."""
        blocks = _find_blocks(model)
        for block in blocks[int(self.first_share * len(blocks)) : -1]:
            vars(block)["forward"] = partial(_run, block, self)

    def for_depth(self, blocks: int, fewest: int) -> None:
        """Return None: blocks differ by their place."""

    def make_reference(self) -> None:
        """Return the technique with all tokens; the difference is the error of dropping some."""

    def _fold(self, model: nn.Module) -> None:
        """Restore the forward pass."""
        for block in _find_blocks(model):
            vars(block).pop("forward", None)


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) and _fits(one[0])]
    if len(lists) != 1 or not all(_fits(block) for block in lists[0]):
        raise ModelError(f"{type(model).__name__} has no blocks of Llama's kind; leave the technique token-drop out")
    return list(lists[0])


def _fits(block: Any) -> bool:
    attention = getattr(block, "self_attn", None)
    parts = ("q_proj", "k_proj", "head_dim")
    return hasattr(block, "input_layernorm") and all(hasattr(attention, one) for one in parts)


def _run(block: nn.Module, settings: TokenDrop, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
    run = partial(type(block).forward, block)
    if args or not (block.training and torch.is_grad_enabled()):
        return run(hidden_states, *args, **given)
    choice = TokenChoice(settings.kept_fraction, settings.group_size, find_real_tokens(given.get("attention_mask")))
    kept = choose_tokens(block, hidden_states, choice)
    return run(hidden_states, **given) if kept is None else run_on_tokens(run, hidden_states, kept, given)
