"""What models of plain blocks share: a configuration, one output, and checkpointing of each block."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["Block", "BlockConfiguration", "BlockModel", "BlockOutput"]


@dataclass
class BlockConfiguration:
    """The settings of a model that training reads, under transformers' names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    pad_token_id: int | None = None
    num_labels: int = 2
    problem_type: str | None = None
    use_cache: bool = False
    is_encoder_decoder: bool = False

    def get_text_config(self) -> "BlockConfiguration":
        """Return itself: the model reads nothing but text."""
        return self


@dataclass
class BlockOutput:
    """The loss if labels were given, and the logits."""

    loss: Tensor | None
    logits: Tensor | None


class Block(nn.Module):
    """One of a stack of like blocks, of which gradient checkpointing keeps the input alone."""

    call_checkpointed: Callable[..., Tensor] | None = None

    def run_or_checkpoint(self, run: Callable[..., Tensor], hidden: Tensor, **arguments: Any) -> Tensor:
        """Return ``run(hidden, **arguments)``, checkpointed while the block is trained, if that is enabled."""
        call = vars(self).get("call_checkpointed")
        if call is None or not self.training:
            return run(hidden, **arguments)
        made: Tensor = call(partial(run, **arguments), hidden)
        return made


class BlockModel(nn.Module, ABC):
    """A backbone and a head. Attributes and methods have the names of transformers' models."""

    base_model_prefix: ClassVar[str]
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True

    def __init__(self, config: BlockConfiguration) -> None:
        super().__init__()
        self.config = config
        self.drawn: list[str] = []
        """The parameters of which the files contain nothing."""

    @property
    def base_model(self) -> nn.Module:
        """The backbone."""
        return self.get_submodule(self.base_model_prefix)

    @abstractmethod
    def get_input_embeddings(self) -> nn.Embedding:
        """Return the layer that turns tokens into hidden states."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the layer that turns hidden states into scores of tokens; None for another head."""
        return None

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """What ``forward`` calls for the loss: that of a technique, or the model's own."""
        replaced: Callable[..., Tensor] | None = vars(self).get("_loss_function")
        return replaced if replaced is not None else self.compute_plain_loss

    @abstractmethod
    def compute_plain_loss(self, logits: Tensor, labels: Tensor, *_: int, **others: Any) -> Tensor:
        """Return the loss of logits."""

    def enable_checkpointing(self, call: Callable[..., Tensor]) -> None:
        """Enable gradient checkpointing: ``call`` runs a block and keeps only its input for backward."""
        for module in self.modules():
            if isinstance(module, Block):
                vars(module)["call_checkpointed"] = call
