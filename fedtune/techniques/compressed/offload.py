"""Offload: blocks keep their activations in a file until the backward pass reads them. Gradients are bit-equal.

What: while a block runs forward, each activation of at least ``min_bytes`` that autograd saves is written to a file
without a name, and its memory is freed. The backward pass reads it again. A storage that several operations save is
written once. Weights stay where they are. The last ``blocks_in_memory`` blocks keep theirs in memory, because their
backward pass begins at once.
Saves: the activations of the other blocks, except small ones. On Linux the system holds written pages as file-backed
memory while there is room, and drops them when there is none.
Costs: each step writes these bytes once and reads them once. Flash wears out: at most ``max_gib_per_round`` are
written in a round, then activations stay in memory. Pages that the backward pass has read before the system wrote them
never reach the flash. A full disk is handled in the same way, with a warning.
Sends: what the other technique sends.
Exactness: bit-equal gradients; the bytes come back as they were, with the same strides.
Privacy: activations reveal private data. The file has no name and ends with the process. Its blocks can stay readable
on the device after a power cut; ``encrypted`` prevents that with a key that is only in memory (AES-256, counter mode).
Use when: gradients must be exact, memory is short, and storage is fast or time is plentiful.
Avoid when: ``gradient-checkpointing`` fits: running a block again is usually faster than flash and wears nothing.
Source: Wu et al., "SSDTrain" (arXiv 2408.10013), sections 3.2 and 3.3: hooks on saved tensors, one write per tensor,
weights left out, the last layers in memory. Zhao et al., "MEMO" (arXiv 2407.12117) offloads a part and recomputes the
rest. Deviations: writes are left to the system's page cache instead of a queue of our own, so nothing is prefetched;
which blocks are written is set, not profiled; nothing is recomputed.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques._block_sequence import find_blocks
from fedtune.techniques._codecs.activation_file import ActivationFile
from fedtune.techniques._technique import Technique
from fedtune.techniques.compressed._offloaded_blocks import StorageKeeper, attach_keeper, detach_keepers

__all__ = ["Offload"]


class Offload(Technique):
    """Keep the activations of blocks in a file."""

    name: ClassVar[str] = "offload"
    paged_base_problem: ClassVar[str | None] = None
    selects_trainable_tensors: ClassVar[bool] = False
    allows_kv_cache: ClassVar[bool] = True
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "gradient-checkpointing": "recomputed blocks keep no activations that could be written to a file",
        "selective-checkpointing": "it decides which activations the same blocks store",
        "meft": "reversible blocks keep no activations that could be written to a file",
    }

    folder: str | None = Field(None, description="where the file is made; default: the system's temporary folder")
    min_bytes: int = Field(1 << 16, ge=1, description="smaller activations stay in memory")
    blocks_in_memory: int = Field(1, ge=0, description="the last blocks, whose activations stay in memory")
    max_gib_per_round: float = Field(16.0, ge=0, description="bytes that a client may write in a round, in GiB")
    encrypted: bool = Field(False, description="encrypt the file with a key that is only in memory")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Check that there are blocks; ``begin_round`` configures them."""
        if not find_blocks(model):
            raise ModelError(f"{type(model).__name__} has no list of blocks; leave the technique offload out")
        file = ActivationFile(self.folder, self.encrypted, int(self.max_gib_per_round * (1 << 30)))
        vars(model)["offload"] = StorageKeeper(file, self.min_bytes)

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Let all blocks but the last ones use the file, after all techniques have rewritten the model."""
        keeper, blocks = _get_keeper(model), find_blocks(model)
        keeper.file.begin_count()
        detach_keepers(model)
        for block in blocks[: max(0, len(blocks) - self.blocks_in_memory)]:
            attach_keeper(block, keeper)

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Note where weights and inputs lie: they stay in memory anyway."""
        held = (*model.parameters(), *model.buffers(), *batch.values())
        _get_keeper(model).weights = frozenset(one.untyped_storage()._cdata for one in held)

    def for_depth(self, blocks: int, fewest: int) -> "Offload | None":
        """Return the technique if a block that is written and all that are not are among the fewest."""
        return self if self.blocks_in_memory < fewest else None

    def make_reference(self) -> None:
        """Return the technique with all activations in memory, which has the same gradients."""

    def _fold(self, model: nn.Module) -> None:
        """Remove the hooks."""
        detach_keepers(model)
        vars(model).pop("offload", None)


def _get_keeper(model: nn.Module) -> StorageKeeper:
    keeper: StorageKeeper = vars(model)["offload"]
    return keeper
