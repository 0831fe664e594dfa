"""BERT-like encoders: learned positions, norms behind each part, and a head over the first token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedtune.models.blocks.activations import ACTIVATIONS
from fedtune.models.blocks.attention import AttentionSettings, compute_attention, make_padding_mask
from fedtune.models.blocks.block_model import Block, BlockConfiguration, BlockModel, BlockOutput
from fedtune.models.blocks.losses import compute_class_loss

__all__ = ["EncoderShape", "TextClassifier"]


@dataclass(frozen=True)
class EncoderShape:
    """All that decides what an encoder computes."""

    config: BlockConfiguration
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_segments: int
    activation: str
    norm_eps: float
    dropout: float
    attention_dropout: float
    head_dropout: float


class Embeddings(nn.Module):
    """The sum of a token's, its segment's and its position's embedding, behind a norm."""

    position_ids: Tensor
    token_type_ids: Tensor

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        config, width = shape.config, shape.config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(shape.num_segments, width)
        self.LayerNorm = nn.LayerNorm(width, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)
        positions = torch.arange(config.max_position_embeddings, device="cpu")[None]  # no file contains them
        self.register_buffer("position_ids", positions, persistent=False)
        self.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Tokens [b, n] -> hidden states [b, n, width]."""
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids).expand(input_ids.shape)
        sum_of_two = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        out: Tensor = self.dropout(self.LayerNorm(sum_of_two + self.position_embeddings(position_ids)))
        return out


class HeadAttention(nn.Module):
    """Attention of heads to all tokens but padding."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        width = shape.config.hidden_size
        self.head_size = width // shape.num_heads
        self.settings = AttentionSettings(self.head_size**-0.5)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(shape.attention_dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[b, n, width] -> [b, n, width]."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return compute_attention(
            query, key, value, attention_mask, self.settings, self.dropout.p if self.training else 0.0
        )


class AddedOutput(nn.Module):
    """norm(dropout(W x + b) + stream)."""

    def __init__(self, inner: int, shape: EncoderShape) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, shape.config.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.config.hidden_size, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """[..., inner] and [..., width] -> [..., width]."""
        out: Tensor = self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)
        return out


class AttentionPart(nn.Module):
    """Attention, added to the stream."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.add_module("self", HeadAttention(shape))
        self.output = AddedOutput(shape.config.hidden_size, shape)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[b, n, width] -> [b, n, width]."""
        attended = self.get_submodule("self")(hidden_states, attention_mask=attention_mask)
        out: Tensor = self.output(attended, hidden_states)
        return out


class Intermediate(nn.Module):
    """act(W x + b)."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.config.hidden_size, shape.intermediate_size)
        self.intermediate_act_fn = ACTIVATIONS[shape.activation]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] -> [..., inner]."""
        out: Tensor = self.intermediate_act_fn(self.dense(hidden_states))
        return out


class EncoderBlock(Block):
    """Attention, then a feed-forward part, each added to the stream and behind a norm."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.attention = AttentionPart(shape)
        self.intermediate = Intermediate(shape)
        self.output = AddedOutput(shape.intermediate_size, shape)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[b, n, width] -> [b, n, width]."""
        return self.run_or_checkpoint(self._run, hidden_states, attention_mask=attention_mask)

    def _run(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        attended = self.attention(hidden, attention_mask=attention_mask)
        out: Tensor = self.output(self.intermediate(attended), attended)
        return out


class BlockStack(nn.Module):
    """All blocks in order."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.layer = nn.ModuleList([EncoderBlock(shape) for _ in range(shape.num_blocks)])

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[b, n, width] -> [b, n, width]."""
        for block in self.layer:
            hidden = block(hidden, attention_mask=attention_mask)
        return hidden


class Pooler(nn.Module):
    """tanh(W x + b) of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[b, n, width] -> [b, width]."""
        out: Tensor = self.activation(self.dense(hidden_states[:, 0]))
        return out


class Encoder(nn.Module):
    """The backbone: embeddings, blocks and the pooler."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape)
        self.encoder = BlockStack(shape)
        self.pooler = Pooler(shape.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Tokens [b, n] -> what the pooler makes of the first one [b, width]."""
        hidden = self.embeddings(input_ids, token_type_ids, position_ids)
        hidden = self.encoder(hidden, make_padding_mask(attention_mask, hidden.shape[1]))
        out: Tensor = self.pooler(hidden)
        return out


class TextClassifier(BlockModel):
    """An encoder with a head for labels."""

    base_model_prefix: ClassVar[str] = "bert"

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__(shape.config)
        self.bert = Encoder(shape)
        self.dropout = nn.Dropout(shape.head_dropout)
        self.classifier = nn.Linear(shape.config.hidden_size, shape.config.num_labels)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens."""
        return self.bert.embeddings.word_embeddings

    def compute_plain_loss(self, logits: Tensor, labels: Tensor, *_: int, **__: Any) -> Tensor:
        """Return the mean loss over the examples."""
        return compute_class_loss(logits, labels, self.config.problem_type)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BlockOutput:
        """Tokens [b, n] -> logits [b, labels], and the loss if labels are given."""
        pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.classifier(self.dropout(pooled))
        return BlockOutput(None if labels is None else self.loss_function(logits=logits, labels=labels), logits)
