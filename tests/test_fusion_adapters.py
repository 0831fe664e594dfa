"""Adapters whose base is not simply the base: other starting points, heads of tied models, tokens of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
)

from fedtune.errors import ModelError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge
from fedtune.offline_merge.adapters.merge_adapters import merge_adapters
from tests.fusion_models import change_json, save, tensors
from tests.tiny import llama
from tests.trained_adapters import LINEARS, by_fedtune, by_peft, gpt2, logits, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True, "r": 4},
    "pissa, patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 1}},
    "pissa, DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "zeros": {"init_lora_weights": True},
    "random": {"init_lora_weights": False},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_starting_point_is_folded_as_peft_folds_it(tmp_path: Path, start: str, dtype: torch.dtype) -> None:
    net = llama()
    net.to(dtype)  # type: ignore[arg-type]
    base = save(net, tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", **STARTS[start])
    found, wanted = by_fedtune(f"{base}+{adapter}", tmp_path / "out"), by_peft(base, adapter)
    close = 1e-5 if dtype == torch.float32 else 0.03
    assert (found - wanted).norm() <= close * wanted.norm()


def test_a_starting_point_is_taken_out_of_a_transposed_weight(tmp_path: Path) -> None:
    base = save(gpt2(), tmp_path / "base")
    settings: dict[str, Any] = {
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "init_lora_weights": "pissa",
    }
    adapter = trained(base, tmp_path / "adapter", **settings)
    found, wanted = by_fedtune(f"{base}+{adapter}", tmp_path / "out"), by_peft(base, adapter)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_an_untrained_start_is_the_base(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    for start in ("pissa", "olora"):
        model = get_peft_model(
            llama().from_pretrained(base), LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=start)
        )
        model.save_pretrained(tmp_path / start)
        found = by_fedtune(f"{base}+{tmp_path / start}", tmp_path / f"{start}-out")
        wanted = logits(AutoModelForCausalLM.from_pretrained(base))
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("pissa_niter_4", "was drawn at random"),
        ("loftq", "depends on more than the adapter and the base"),
        ("corda", "depends on more than the adapter and the base"),
        ("lora_ga", "depends on more than the adapter and the base"),
        ("of-tomorrow", "depends on more than the adapter and the base"),
    ],
)
def test_a_start_that_cannot_be_rebuilt_is_refused(tmp_path: Path, start: str, why: str) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", {"init_lora_weights": start})
    with pytest.raises(
        ModelError, match=rf"adapter has init_lora_weights {start}, which changed the base by what {why}; "
    ):
        by_fedtune(f"{base}+{adapter}", tmp_path / "out")


@pytest.mark.parametrize("key", ["alora_invocation_tokens", "arrow_config"])
def test_an_adapter_of_some_tokens_only_is_refused(tmp_path: Path, key: str) -> None:
    base = save(llama(), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", {key: [1, 2]})
    with pytest.raises(ModelError, match=f"adapter has {key}, so it acts on some tokens only and is no change of the"):
        by_fedtune(f"{base}+{adapter}", tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_beside_another_base_are_not_merged_by_their_products(tmp_path: Path, start: str) -> None:
    base = save(llama(), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed, init_lora_weights=start) for seed in (1, 2)]
    with pytest.raises(ModelError, match=f"a1 stands beside a base of which {start} took a part away"):
        merge_adapters(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def dora(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = save(llama(), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed, use_dora=True) for seed in (1, 2)]
    return base, folders


def test_what_a_merge_of_dora_misses_is_measured_on_the_base(tmp_path: Path) -> None:
    base, folders = dora(tmp_path)
    modules = merge_adapters(folders, tmp_path / "out", AdapterMerge(weights=[1, 1]))
    whole = [
        tensors(_folded(base, folder, tmp_path / f"m{place}"))
        for place, folder in enumerate([*folders, tmp_path / "out"])
    ]
    before = tensors(base)
    for one in modules:
        name = f"{one.module}.weight"
        first, second, made = (side[name].double() - before[name] for side in whole)
        wanted = (first + second) / 2
        assert one.whole == pytest.approx(float(wanted.norm()), rel=1e-3)
        assert one.error == pytest.approx(float((made - wanted).norm() / wanted.norm()), rel=1e-2)
        assert one.error > 1e-3


def _folded(base: Path, adapter: Path, out: Path) -> Path:
    with silence_transformers():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        model.merge_and_unload().save_pretrained(out)
    return out


def test_what_a_merge_of_dora_misses_is_not_known_without_the_base(tmp_path: Path) -> None:
    base, folders = dora(tmp_path)
    base.rename(tmp_path / "elsewhere")
    assert all(one.error != one.error for one in merge_adapters(folders, tmp_path / "out"))


def test_a_module_that_is_an_embedding_in_one_adapter_alone_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save(llama(), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed, target_modules=["embed_tokens"]) for seed in (1, 2)]
    path = folders[1] / "adapter_model.safetensors"
    turned = {
        name.replace("lora_embedding_A", "lora_A.weight").replace("lora_embedding_B", "lora_B.weight"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(turned, path)
    with pytest.raises(
        ModelError, match=r"model.embed_tokens is an embedding in .*a1 and none in .*a2; give adapters of"
    ):
        merge_adapters(folders, tmp_path / "out")
