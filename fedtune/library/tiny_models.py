"""Models of a few thousand parameters and batches for them, on which plug-ins are tried."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TINY_MODELS", "TinyModel"]

_VOCABULARY, _TOKENS, _SIDE, _LABELS = 40, 8, 32, 3


class TinyModel(NamedTuple):
    """A model by a seed, its task, and a batch by a seed."""

    name: str
    task: str
    build: Callable[[int], nn.Module]
    make_batch: Callable[[int], dict[str, Tensor]]


def _describe_text_model() -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }


def _build_decoder(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_describe_text_model(), use_cache=False))


def _build_encoder(seed: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**(_describe_text_model() | {"num_labels": _LABELS})))


def _build_residual_net(seed: int) -> nn.Module:
    from fedtune.models.resnet import ResNet18

    torch.manual_seed(seed)
    return ResNet18(_LABELS, small=True, width=4)


def _build_mobile_net(seed: int) -> nn.Module:
    from fedtune.models.mobilenet_v2 import MobileNetV2

    torch.manual_seed(seed)
    return MobileNetV2(_LABELS)


def _draw_tokens(seed: int) -> Tensor:
    return torch.randint(1, _VOCABULARY, (4, _TOKENS), generator=torch.Generator().manual_seed(seed))


def _draw_labels(seed: int) -> Tensor:
    return torch.randint(_LABELS, (4,), generator=torch.Generator().manual_seed(seed + 1))


def _make_generation_batch(seed: int) -> dict[str, Tensor]:
    ids = _draw_tokens(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _make_text_batch(seed: int) -> dict[str, Tensor]:
    ids = _draw_tokens(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _draw_labels(seed)}


def _make_picture_batch(seed: int) -> dict[str, Tensor]:
    pixels = torch.randn(4, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": _draw_labels(seed)}


TINY_MODELS = (
    TinyModel("a Llama", "text-generation", _build_decoder, _make_generation_batch),
    TinyModel("a BERT classifier", "text-classification", _build_encoder, _make_text_batch),
    TinyModel("a ResNet", "image-classification", _build_residual_net, _make_picture_batch),
    TinyModel("a MobileNetV2", "image-classification", _build_mobile_net, _make_picture_batch),
)
