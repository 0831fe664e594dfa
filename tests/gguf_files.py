"""Tiny GGUF files, as llama.cpp's converter would write them."""

from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedModel

__all__ = ["write_gguf"]


def write_gguf(path: Path, model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    """A tiny decoder as its converter would write it: rotary pairs side by side."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(32)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        value = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        own = kind if value.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(value.numpy(), own)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Letters, each a token of its own, and one pair."""
    letters = [*(chr(ord("!") + number) for number in range(size - 2)), '!"']
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", *letters])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * len(letters)])
    writer.add_token_merges(['! "'])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
