"""Every kind of model that can be merged is read as the library that wrote it would read it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge.readers.model_reader import ModelReader
from fedtune.offline_merge.readers.open_model import open_model
from tests.fusion_models import base_and_tuned, change_json, moved, save, tensors
from tests.gguf_files import write_gguf
from tests.tiny import bert, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
LINEARS = ["q_proj", "v_proj", "down_proj"]


def whole(weights: ModelReader) -> dict[str, Tensor]:
    """All tensors, read in pieces of three rows."""
    found = {}
    for name, form in weights.tensor_infos.items():
        if not form.shape:
            found[name] = weights.rows(name, 0, 1)
            continue
        starts = range(0, form.num_rows, 3)
        found[name] = torch.cat([weights.rows(name, start, min(start + 3, form.num_rows)) for start in starts])
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape, name
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_read_as_it_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    [folder] = base_and_tuned(tmp_path, 0, dtype)
    found = whole(open_model(str(folder)))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert_same(found, tensors(folder))


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "sharded", max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(whole(open_model(f"path:{folder}")), tensors(folder))


def _gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def _trained(adapted: Any) -> Any:
    """An adapter that changes something, by every tensor it trains."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return adapted


ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, {"target_modules": LINEARS}),
    "rslora": (llama, {"target_modules": LINEARS, "use_rslora": True, "r": 4}),
    "patterns": (
        llama,
        {"target_modules": LINEARS, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.*v_proj": 3}},
    ),
    "patterns, rsLoRA": (
        llama,
        {
            "target_modules": LINEARS,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {r"layers\.1\..*v_proj": 9},
        },
    ),
    "dora": (llama, {"target_modules": LINEARS, "use_dora": True}),
    "biases": (bert, {"target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": (_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "conv1d dora": (_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_read_as_peft_merges_it(tmp_path: Path, kind: str) -> None:
    build, settings = ADAPTERS[kind]
    base = save(build(), tmp_path / "base")
    model = build().from_pretrained(base)
    adapted = _trained(get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 7, **settings})))
    adapted.save_pretrained(tmp_path / "adapter")
    found = whole(open_model(f"{base}+{tmp_path / 'adapter'}"))
    merged = adapted.merge_and_unload()
    save(merged, tmp_path / "merged")
    assert_same(found, tensors(tmp_path / "merged"), 1e-6)
    assert any(not torch.equal(found[name], tensor) for name, tensor in tensors(base).items())


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    _trained(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(tmp_path / "a")
    alone = whole(open_model(str(tmp_path / "a")))
    assert_same(alone, whole(open_model(f"{base}+{tmp_path / 'a'}")))


def test_an_adapter_for_a_task_fits_a_base_without_the_prefix(tmp_path: Path) -> None:
    model = bert()
    save(model.bert, tmp_path / "base")
    adapted = _trained(get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")))
    adapted.save_pretrained(tmp_path / "adapter")
    found = whole(open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    save(adapted.merge_and_unload(), tmp_path / "merged")
    assert_same(found, tensors(tmp_path / "merged"), 1e-6)


def _quantised(folder: Path, nested: bool, width: int) -> dict[str, Tensor]:
    """Stores a folder's projections in four bits, as bitsandbytes does; returns what it reads back."""
    wanted, stored = {}, {}
    for name, tensor in tensors(folder).items():
        if "proj" not in name:
            stored[name] = wanted[name] = tensor
            continue
        packed, state = quantize_4bit(tensor, blocksize=width, compress_statistics=nested, quant_type="nf4")
        stored[name] = packed
        stored |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        # As one row: its kernel for processors takes the wrong scales where a row is shorter than a block.
        state.shape = torch.Size([1, tensor.numel()])
        wanted[name] = dequantize_4bit(packed, state).reshape(tensor.shape)
    save_file(stored, folder / "model.safetensors")
    change_json(folder / "config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    return wanted


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("hidden", [16, 20])
def test_four_bits_are_read_as_bitsandbytes_reads_them(tmp_path: Path, nested: bool, hidden: int) -> None:
    folder = save(llama(hidden_size=hidden), tmp_path / "model")
    wanted = _quantised(folder, nested, 64)
    opened = open_model(str(folder))
    assert opened.is_quantised
    assert_same(whole(opened), wanted, 1e-6)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    model = moved(llama(hidden_size=32, intermediate_size=64, num_key_value_heads=1), 1)
    write_gguf(tmp_path / "tiny.gguf", model, gguf.GGMLQuantizationType[kind])
    opened = open_model(str(tmp_path / "tiny.gguf"))
    with silence_transformers():
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert_same(whole(opened), dict(read.state_dict()))
    assert opened.is_quantised == kind.startswith("Q")
