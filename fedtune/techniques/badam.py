"""BAdam: train one block of the model at a time, in turn.

What: in each round only one block is trained, and a classifier's new head. Blocks take turns from the first to the
last, each for ``rounds_per_block`` rounds. Within its rounds, a block is trained with the recipe's optimiser. All other
weights stay fixed.
Saves: gradients and optimiser state of all blocks but one: with Adam, twelve bytes per weight of the others. Blocks
below the trained one store no activations, because no gradient passes them; on average half of all activations.
Sends: up, one block and the head. Down, all weights, because those of earlier rounds have changed.
Error: gradients of the trained block are exact. All weights have moved after as many rounds as there are blocks.
Use when: all of the model should move, memory does not allow optimiser state for all of it, and rounds are many.
Avoid when: there are fewer rounds than blocks, or an adapter is enough (``lora``).
Source: Luo, Yu and Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models" (arXiv
2404.02827), algorithm 1. Deviations: a block's turn is a number of rounds instead of K steps, with fresh optimiser
state, so that all clients train the same block. The order is from the first block to the last one, where the paper also
draws it. Embeddings, the last norm and a language model's head stay fixed.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._block_sequence import find_blocks
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters

__all__ = ["Badam"]

_TRAINS = "badam trains the weights of one block at a time"


class Badam(Technique):
    """Train one block in each round, and a classifier's head."""

    name: ClassVar[str] = "badam"
    fits_zeroth_order: ClassVar[bool] = True
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("full", "bias", "head-only", "last-blocks", "batch-norm", "compact", "dynamic-pruning"), _TRAINS
        ),
        **dict.fromkeys(("lora", "qlora", "o-lora", "inf-lora", "meft", "mobiletl", "tinytl"), _TRAINS),
    }

    rounds_per_block: int = Field(1, ge=1, description="rounds in a row that train a block")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Train the first block and a classifier's head."""
        if not any(True for block in find_blocks(model) for _ in block.parameters()):
            raise ModelError(f"{type(model).__name__} has no list of blocks to train in turn; take full")
        if task.has_new_head:
            unfreeze_parameters(model, list_head_parameters(model))
        self.begin_round(model, 1)

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Train the block whose turn it is."""
        blocks = [block for block in find_blocks(model) if any(True for _ in block.parameters())]
        turn = (round_number - 1) // self.rounds_per_block % len(blocks)
        for place, block in enumerate(blocks):
            block.requires_grad_(place == turn)

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """The weights of all blocks: each is trained in some round."""
        inside = {id(one) for block in find_blocks(model) for one in block.parameters()}
        return [name for name, one in model.named_parameters() if id(one) in inside]

    def changes_per_round(self) -> bool:
        """Return True: rounds train different blocks."""
        return True

    def has_unchanged_base(self) -> bool:
        """Return False: the weights of blocks change."""
        return False

    def for_depth(self, blocks: int, fewest: int) -> None:
        """Return None: rounds differ by the place of the trained block."""
