"""Llama-like decoders: rotary positions, RMS norms, gated MLPs and shared heads of keys and values."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedtune.models.blocks.activations import ACTIVATIONS
from fedtune.models.blocks.attention import AttentionSettings, compute_attention, make_causal_mask
from fedtune.models.blocks.block_model import Block, BlockConfiguration, BlockModel, BlockOutput
from fedtune.models.blocks.losses import compute_causal_loss
from fedtune.models.blocks.rotary import RotaryEmbedding, RotarySettings, rotate_heads

__all__ = ["DecoderShape", "LanguageModel"]


@dataclass(frozen=True)
class DecoderShape:
    """All that decides what a decoder computes."""

    config: BlockConfiguration
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_key_heads: int
    rotary: RotarySettings
    activation: str
    norm_eps: float
    has_query_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    attention_dropout: float
    window: int | None
    is_head_tied: bool


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in single precision, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        fine = x.to(torch.float32)
        fine = fine * torch.rsqrt(fine.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * fine.to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention of heads with rotary positions."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.head_size, width = shape.rotary.head_size, shape.config.hidden_size
        queries, keys = shape.num_heads * self.head_size, shape.num_key_heads * self.head_size
        self.settings = AttentionSettings(self.head_size**-0.5, shape.num_heads // shape.num_key_heads, True)
        self.dropout = shape.attention_dropout
        self.q_proj = nn.Linear(width, queries, bias=shape.has_query_bias)
        self.k_proj = nn.Linear(width, keys, bias=shape.has_query_bias)
        self.v_proj = nn.Linear(width, keys, bias=shape.has_query_bias)
        self.o_proj = nn.Linear(queries, width, bias=shape.has_output_bias)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None
    ) -> Tensor:
        """[b, n, width] -> [b, n, width]."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_heads(query, *position_embeddings), rotate_heads(key, *position_embeddings)
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.o_proj(compute_attention(query, key, value, attention_mask, self.settings, dropout))
        return out


class GatedMlp(nn.Module):
    """down(act(gate(x)) up(x))."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        width, inner, bias = shape.config.hidden_size, shape.intermediate_size, shape.has_mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACTIVATIONS[shape.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderBlock(Block):
    """Attention, then the MLP, each behind a norm and added to the stream."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape)
        self.mlp = GatedMlp(shape)
        self.input_layernorm = RmsNorm(shape.config.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RmsNorm(shape.config.hidden_size, shape.norm_eps)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[b, n, width] -> [b, n, width]."""
        return self.run_or_checkpoint(
            self._run, hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings
        )

    def _run(self, hidden: Tensor, **arguments: Any) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **arguments)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Decoder(nn.Module):
    """The backbone: embeddings, blocks and a norm."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        config = shape.config
        self.window = shape.window
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderBlock(shape) for _ in range(shape.num_blocks)])
        self.norm = RmsNorm(config.hidden_size, shape.norm_eps)
        self.rotary_emb = RotaryEmbedding(shape.rotary)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Tokens [b, n] -> hidden states [b, n, width]."""
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = make_causal_mask(attention_mask, position_ids, len(hidden), self.window)
        positions = self.rotary_emb(hidden, position_ids)
        for block in self.layers:
            hidden = block(hidden, attention_mask=mask, position_embeddings=positions)
        out: Tensor = self.norm(hidden)
        return out


class LanguageModel(BlockModel):
    """A decoder with a head over the vocabulary."""

    base_model_prefix: ClassVar[str] = "model"

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__(shape.config)
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.config.hidden_size, shape.config.vocab_size, bias=False)
        if shape.is_head_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def compute_plain_loss(self, logits: Tensor, labels: Tensor, *_: int, **others: Any) -> Tensor:
        """Return the cross-entropy of each token given those before it."""
        return compute_causal_loss(logits, labels, **{"vocab_size": self.config.vocab_size, **others})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> BlockOutput:
        """Tokens [b, n] -> logits [b, n, v], and the loss if labels [b, n] are given."""
        logits = self.lm_head(self.model(input_ids, attention_mask, position_ids))
        if labels is None:
            return BlockOutput(None, logits)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return BlockOutput(loss, logits)
