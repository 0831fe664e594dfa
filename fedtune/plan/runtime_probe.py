"""Measure the memory of a process that has imported what a trainer imports and has run a small step.

``python -m fedtune.plan.runtime_probe RUNTIME MODULE...`` prints the anonymous and the file-backed bytes. RUNTIME is
``torch``, ``blocks``, ``chat`` or ``transformers``, all but the first perhaps with the source of a model whose
tokenizer is loaded. A trainer of plain blocks lets go of it before it trains, so that process does too. ``chat`` is one
whose conversations are written by the tokenizer of transformers.
"""

import gc
import importlib
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["main"]


def main(runtime: str, modules: list[str]) -> None:
    """Import the modules, run a step of the kind and print the bytes."""
    from fedtune.memory.allocator import fix_mmap_threshold
    from fedtune.memory.process_memory import read_resident_memory
    from fedtune.models.blocks.preference import prefer_plain_blocks

    fix_mmap_threshold()
    for module in modules:
        importlib.import_module(module)
    libraries, _, source = runtime.partition(" ")
    if libraries in ("blocks", "chat"):
        prefer_plain_blocks()
        _use_tokenizer(source, writes_chats=libraries == "chat")
        gc.collect()
        keep = _train_a_little("blocks")
    else:
        keep = [*_train_a_little(libraries), _load_tokenizer(source)]
    found = read_resident_memory()
    anonymous, files = (0, 0) if found is None else found
    print(anonymous, files, len(keep))


def _train_a_little(libraries: str) -> list[Any]:
    """Run two steps of a tiny model, so that what is imported and allocated once is there."""
    from fedtune.memory.heap import release_freed
    from fedtune.recipe.schema import Train, Unit
    from fedtune.recipe.task_settings import TaskUnit
    from fedtune.tasks import get_task
    from fedtune.techniques import apply_techniques, build_techniques
    from fedtune.training.optimisers import make_optimiser

    model, batch, name = _MAKERS[libraries]()
    task = get_task(TaskUnit.model_validate(name))
    apply_techniques(build_techniques([Unit(name=one) for one in _TECHNIQUES[libraries]]), model, task, 0)
    optimiser = make_optimiser(Train(local_steps=1), [one for one in model.parameters() if one.requires_grad])
    model.train()
    for _ in range(2):
        task.compute_loss(model, batch).backward()
        optimiser.step(1e-3)
    release_freed()
    return [model, optimiser]


def _use_tokenizer(source: str, *, writes_chats: bool) -> None:
    """Load a model's tokenizer and let go of it."""
    from fedtune.errors import FedtuneError

    tokenizer = _load_tokenizer(source)
    with suppress(FedtuneError, ValueError, AttributeError):  # the model has no tokenizer, or no template
        if writes_chats:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def _load_tokenizer(source: str) -> Any:
    """Return a model's tokenizer, None without a model or if it has none."""
    from fedtune.errors import FedtuneError
    from fedtune.models import load_tokenizer
    from fedtune.recipe.schema import ModelSettings

    with suppress(FedtuneError):
        return load_tokenizer(ModelSettings(source=source)) if source else None
    return None


_TECHNIQUES = {
    "torch": ["full"],
    "blocks": ["lora", "gradient-checkpointing"],
    "transformers": ["lora", "gradient-checkpointing"],
}

Tiny = tuple["nn.Module", dict[str, "Tensor"], str]
"""A model of a few thousand parameters, a batch and the name of its task."""


def _make_image_model() -> Tiny:
    import torch

    from fedtune.models.resnet import ResNet18

    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    return ResNet18(2, small=True, width=4), batch, "image-classification"


_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "use_cache": False,
}


def _make_text_model() -> Tiny:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES)), _make_text_batch(), "text-generation"


def _make_block_model() -> Tiny:
    from fedtune.models.blocks.decoder import LanguageModel
    from fedtune.models.blocks.decoder_configuration import read_decoder_shape

    shape = read_decoder_shape({"model_type": "llama", **_SIZES})
    return LanguageModel(shape), _make_text_batch(), "text-generation"


def _make_text_batch() -> "dict[str, Tensor]":
    import torch

    ids = torch.ones(2, 8, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


_MAKERS = {"torch": _make_image_model, "blocks": _make_block_model, "transformers": _make_text_model}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
