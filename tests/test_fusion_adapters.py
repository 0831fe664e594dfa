"""Adapters whose base is not simply the base: other starting points, heads of tied models, tokens of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedtune.errors import ModelError
from fedtune.fusion import MergeConfig, merge, prepare
from fedtune.fusion.adapters import merge_adapters
from fedtune.models.quiet import quiet
from tests.fusion_models import change_json, save, save_tokenizer, tensors, words
from tests.tiny import VOCABULARY, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
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
    with quiet():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))


def by_fedtune(source: str, out: Path, **keys: Any) -> Tensor:
    """The logits of the folder that a merge of one model writes, loaded by plain transformers."""
    value = {"merge_method": "linear", "models": [source], **keys}
    merge(prepare(MergeConfig.model_validate(value)), out, "a card")
    with quiet():
        model, info = _loaded(out)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits(model)


def _loaded(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, output_loading_info=True)


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


HEADS: dict[str, dict[str, Any]] = {
    "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "the output": {"modules_to_save": ["lm_head"]},
    "the input": {"modules_to_save": ["embed_tokens"]},
    "a product beside the input": {"target_modules": ["embed_tokens", "q_proj"]},
    "a product beside the output": {"target_modules": ["lm_head", "q_proj"]},
    "neither": {},
}


@pytest.mark.parametrize("what", HEADS)
@pytest.mark.parametrize("tie", [True, False])
def test_heads_of_tied_models_are_what_peft_makes_of_them(tmp_path: Path, what: str, tie: bool) -> None:
    base = save(llama(tie_word_embeddings=tie), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", **HEADS[what])
    wanted = by_peft(base, adapter)
    torch.testing.assert_close(by_fedtune(f"{base}+{adapter}", tmp_path / "out"), wanted, rtol=1e-4, atol=1e-5)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert told == (tie and what == "neither")


def test_a_gpt2_whose_input_alone_is_trained_keeps_its_output(tmp_path: Path) -> None:
    base = save(gpt2(), tmp_path / "base")
    adapter = trained(
        base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte"]
    )
    wanted = by_peft(base, adapter)
    torch.testing.assert_close(by_fedtune(f"{base}+{adapter}", tmp_path / "out"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_a_file_with_an_output_of_its_own_is_read_as_transformers_reads_it(tmp_path: Path, same: bool) -> None:
    from safetensors.torch import save_file

    folder = save(llama(tie_word_embeddings=True), tmp_path / "model")
    found = tensors(folder)
    rows = found["model.embed_tokens.weight"]
    found["lm_head.weight"] = rows.clone() if same else rows.flip(0).clone()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    with quiet():
        wanted = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(by_fedtune(str(folder), tmp_path / "out"), wanted)
    assert ("lm_head.weight" in tensors(tmp_path / "out")) != same


def test_a_head_beside_a_tied_base_is_merged_by_what_it_differs(tmp_path: Path) -> None:
    base = save(llama(tie_word_embeddings=True), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed, modules_to_save=["lm_head"]) for seed in (1, 2)]
    value = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [f"{base}+{one}" for one in folders]}
    merge(prepare(MergeConfig.model_validate(value)), tmp_path / "out", "a card")
    embedding = tensors(base)["model.embed_tokens.weight"]
    name = "base_model.model.lm_head.weight"
    own = [tensors(folder)[name] for folder in folders]
    found = tensors(tmp_path / "out")
    torch.testing.assert_close(found["lm_head.weight"], own[0] + own[1] - embedding)
    assert torch.equal(found["model.embed_tokens.weight"], embedding)


def grown(tmp_path: Path, name: str, token: str, tie: bool, trains: str = "rows") -> tuple[Path, Path]:
    """A base, and an adapter trained on one more token, with its tokenizer beside it."""
    base = tmp_path / "base"
    if not base.exists():
        save(llama(tie_word_embeddings=tie), base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    settings: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]} if trains == "rows" else {}
    targets = ["q_proj", "embed_tokens"] if trains == "products" else ["q_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **settings))
    random = torch.Generator().manual_seed(len(token))
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    adapted.save_pretrained(tmp_path / name, save_embedding_layers=True)
    save_tokenizer(tmp_path / name, words(), (token,))
    return base, tmp_path / name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("trains", ["rows", "products", "neither"])
def test_the_tokens_an_adapter_adds_are_the_results(tmp_path: Path, tie: bool, trains: str) -> None:
    base, adapter = grown(tmp_path, "one", "<call>", tie, trains)
    if trains == "products" and not tie:  # peft does not save the output, which grew too
        with pytest.raises(
            ModelError, match=r"adapter|one has another number of tokens in one layer than in another \(41"
        ):
            by_fedtune(f"{base}+{adapter}", tmp_path / "out")
        return
    found = by_fedtune(f"{base}+{adapter}", tmp_path / "out")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
        wanted = logits(PeftModel.from_pretrained(model, str(adapter)))
    assert tokenizer("word3 <call>")["input_ids"] == [3, VOCABULARY]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_tokens_of_two_adapters_make_a_union(tmp_path: Path) -> None:
    base, one = grown(tmp_path, "one", "<call>", tie=False)
    _, two = grown(tmp_path, "two", "<think>", tie=False)
    value = {"models": [f"{base}+{one}", f"{base}+{two}"], "tokenizer_source": "union"}
    merge(prepare(MergeConfig.model_validate(value)), tmp_path / "out", "a card")
    with quiet():
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")("<call> <think>")["input_ids"]
    name = "model.embed_tokens.weight"
    found, first, second = (
        tensors(tmp_path / "out")[name],
        *(tensors(folder)[f"base_model.{'model.'}{name}"] for folder in (one, two)),
    )
    torch.testing.assert_close(found[ids[0]], first[VOCABULARY])
    torch.testing.assert_close(found[ids[1]], second[VOCABULARY])


def dora(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = save(llama(), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed, use_dora=True) for seed in (1, 2)]
    return base, folders


def test_what_a_merge_of_dora_misses_is_measured_on_the_base(tmp_path: Path) -> None:
    base, folders = dora(tmp_path)
    modules = merge_adapters(folders, tmp_path / "out", weights=[1, 1])
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
    with quiet():
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
