"""Adapters that peft writes after some training, and the logits of what becomes of them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import MergeConfig, prepare_merge, write_merged_model
from tests.tiny import VOCABULARY

__all__ = ["LINEARS", "by_fedtune", "by_peft", "gpt2", "logits", "trained"]

LINEARS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 23).reshape(2, 10)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def trained(base: Path, adapter: Path, seed: int = 3, **settings: Any) -> Path:
    """An adapter as peft writes it after some training, for the base as it is stored."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": LINEARS, **settings}))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    adapted.save_pretrained(adapter)
    return adapter


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def by_peft(base: Path, adapter: Path) -> Tensor:
    """The logits of peft's own model, nothing merged."""
    with silence_transformers():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))


def by_fedtune(source: str, out: Path, **keys: Any) -> Tensor:
    """The logits of the folder that a merge of one model writes, loaded by plain transformers."""
    value = {"merge_method": "linear", "models": [source], **keys}
    write_merged_model(prepare_merge(MergeConfig.model_validate(value)), out, "a card")
    with silence_transformers():
        model, info = _loaded(out)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits(model)


def _loaded(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, output_loading_info=True)
