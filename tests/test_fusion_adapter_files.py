"""Adapters as other tools and other releases of peft leave them: read as peft reads them, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.offline_merge.adapters.merge_adapters import merge_adapters
from fedtune.offline_merge.readers.adapter_model import read_base_model_name
from fedtune.offline_merge.readers.open_model import open_model
from tests.fusion_models import change_json, save, tensors
from tests.tiny import llama
from tests.trained_adapters import by_fedtune, by_peft, gpt2, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

Spoil = Callable[[Path], None]


def said(**settings: Any) -> Spoil:
    return lambda folder: change_json(folder / "adapter_config.json", settings)


def held(change: Callable[[str, Tensor], Any]) -> Spoil:
    """Each tensor changed, left out where nothing comes of it, or under another name."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            match change(name, tensor):
                case str(other):
                    found[other] = tensor
                case Tensor() as made:
                    found[name] = made
        save_file(found, file)

    return spoil


NAN = float("nan")
TABLE: dict[str, tuple[Spoil, str]] = {
    "a setting of another release": (
        said(use_foo=True),
        r"has use_foo, which fedtune does not know; fold it with a peft that does$",
    ),
    "no tensor": (held(lambda name, tensor: None), r"safetensors holds no tensor; train or fetch it again$"),
    "the parts of one process": (
        held(lambda name, tensor: torch.zeros(0)),
        r"holds an empty factor of model\.layers\.\d.*, as when each process saves its own part; save it again",
    ),
    "another rank than it says": (said(r=8), r"holds factors of rank 2 for model.*, but says 8, on which its scale"),
    "another rank than a pattern": (
        said(rank_pattern={"layers.1.self_attn.v_proj": 4}),
        r"holds factors of rank 2 for model\.layers\.1\.self_attn\.v_proj, but says 4, on which",
    ),
    "no scale": (said(lora_alpha=None), r"does not say lora_alpha, which scales its products; fetch adapter_config"),
    "a word for a scale": (said(lora_alpha="x"), r"has 'x' as lora_alpha of .*, which is no number; fetch adapter_c"),
    "a scale that is no number": (said(lora_alpha=NAN), r"has nan as lora_alpha of model.*, which is no number"),
    "no pattern": (said(rank_pattern=["a"]), r"has rank_pattern \['a'\], which is no pattern; fetch adapter_config"),
    "a broken pattern": (said(alpha_pattern={"[": 3}), r"has alpha_pattern {'\[': 3}, which is no pattern; fetch ad"),
    "one head that is no list": (said(modules_to_save="lm_head"), r"has modules_to_save 'lm_head', which is no list"),
    "magnitudes that are not there": (said(use_dora=True), r"has use_dora and none of its magnitudes for model.*"),
    "names of another layout": (
        held(lambda name, tensor: name.replace("lora_A", "lora_A.default")),
        r"holds base_model.*lora_A\.default\.weight, which is no LoRA factor; fold it with peft$|has only factor B",
    ),
    "names with a prefix twice": (
        held(lambda name, tensor: f"base_model.model.{name}"),
        r"changes base_model\.model\.model.*, which .*base does not have; name its own base$",
    ),
}


@pytest.mark.parametrize("what", TABLE)
def test_an_adapter_that_says_one_thing_and_holds_another_is_refused(tmp_path: Path, what: str) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    spoil, message = TABLE[what]
    spoil(adapter)
    with pytest.raises(FedtuneError, match=message) as refused:
        by_fedtune(f"{base}+{adapter}", tmp_path / "out")
    assert "\n" not in str(refused.value)
    if "prefix" not in what:  # which only the base tells
        with pytest.raises(FedtuneError, match=message):
            merge_adapters([adapter, adapter], tmp_path / "merged")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "merged").exists()


def test_magnitudes_that_are_not_spoken_of_are_refused(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", use_dora=True)
    said(use_dora=False)(adapter)
    with pytest.raises(FedtuneError, match=r"has no use_dora and some of its magnitudes for model.*; fetch it again$"):
        open_model(f"{base}+{adapter}")


def test_settings_that_only_tell_who_wrote_them_change_nothing(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    said(unsloth_fixed=True, tool_version="3", use_foo=False)(adapter)
    torch.testing.assert_close(
        by_fedtune(f"{base}+{adapter}", tmp_path / "out"), by_peft(base, adapter), rtol=1e-4, atol=1e-5
    )


def test_an_adapter_in_eight_bits_is_read_as_numbers(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    held(lambda name, tensor: tensor.to(torch.float8_e4m3fn))(adapter)
    found = by_fedtune(f"{base}+{adapter}", tmp_path / "out")
    held(lambda name, tensor: tensor.float())(adapter)
    torch.testing.assert_close(found, by_peft(base, adapter), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("targets", [["c_proj"], ["c_attn"], ["c_attn", "c_proj", "lm_head"]])
def test_what_is_transposed_is_told_by_the_layer_and_not_by_the_adapter(
    tmp_path: Path, targets: list[str], flag: bool
) -> None:
    """peft corrects the flag layer by layer as it loads; of a square weight no shape tells."""
    base = save(gpt2(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", target_modules=targets)
    said(fan_in_fan_out=flag)(adapter)
    torch.testing.assert_close(
        by_fedtune(f"{base}+{adapter}", tmp_path / "out"), by_peft(base, adapter), rtol=1e-4, atol=1e-5
    )


def test_no_linear_layer_is_transposed(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    said(fan_in_fan_out=True)(adapter)
    torch.testing.assert_close(
        by_fedtune(f"{base}+{adapter}", tmp_path / "out"), by_peft(base, adapter), rtol=1e-4, atol=1e-5
    )


def test_a_model_that_transformers_lacks_is_read_as_the_adapter_says(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    change_json(base / "config.json", {"model_type": "own"})
    plain = open_model(f"{base}+{adapter}")
    said(fan_in_fan_out=True)(adapter)
    turned = open_model(f"{base}+{adapter}")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = tensors(base)[name]
    torch.testing.assert_close(turned.whole(name) - before, (plain.whole(name) - before).T)


@pytest.mark.parametrize("revision", [None, "abc"])
def test_an_adapter_is_for_the_revision_of_its_base_that_it_names(tmp_path: Path, revision: str | None) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    said(base_model_name_or_path="someone/model", revision=revision)(adapter)
    assert read_base_model_name(adapter) == ("someone/model" if revision is None else "someone/model@abc")
    said(base_model_name_or_path=str(base), revision=revision)(adapter)
    assert read_base_model_name(adapter) == str(base)


def test_experts_that_are_stored_one_by_one_are_changed_one_by_one(tmp_path: Path) -> None:
    """transformers holds them together in memory; adapters of older releases name them as the file does."""
    from transformers import MixtralConfig, MixtralForCausalLM

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_local_experts": 2, "vocab_size": 40}
    config = MixtralConfig(**size, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    base, adapter = save(MixtralForCausalLM(config), tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    a, b = torch.randn(2, 32), torch.randn(16, 2)
    factors = {f"base_model.model.{module}.lora_{key}.weight": tensor for key, tensor in {"A": a, "B": b}.items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["w2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    by_fedtune(f"{base}+{adapter}", tmp_path / "out")
    found, before = tensors(tmp_path / "out"), tensors(base)
    for name, tensor in before.items():
        wanted = tensor + 1.5 * b @ a if name == f"{module}.weight" else tensor
        torch.testing.assert_close(found[name], wanted)
