"""Adapters with heads of their own, on tied models and others, and with tokens of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from fedtune.errors import ModelError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import MergeConfig, prepare_merge, write_merged_model
from fedtune.offline_merge.adapters.merge_adapters import merge_adapters
from tests.fusion_models import save, save_tokenizer, tensors, words
from tests.test_fusion_stacks import llava
from tests.tiny import VOCABULARY, llama
from tests.trained_adapters import by_fedtune, by_peft, gpt2, logits, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


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
    with silence_transformers():
        wanted = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(by_fedtune(str(folder), tmp_path / "out"), wanted)
    assert ("lm_head.weight" in tensors(tmp_path / "out")) != same


def test_a_head_beside_a_tied_base_is_merged_by_what_it_differs(tmp_path: Path) -> None:
    base = save(llama(tie_word_embeddings=True), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed, modules_to_save=["lm_head"]) for seed in (1, 2)]
    value = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [f"{base}+{one}" for one in folders]}
    write_merged_model(prepare_merge(MergeConfig.model_validate(value)), tmp_path / "out", "a card")
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
    with silence_transformers():
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
    write_merged_model(prepare_merge(MergeConfig.model_validate(value)), tmp_path / "out", "a card")
    with silence_transformers():
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")("<call> <think>")["input_ids"]
    name = "model.embed_tokens.weight"
    found, first, second = (
        tensors(tmp_path / "out")[name],
        *(tensors(folder)[f"base_model.{'model.'}{name}"] for folder in (one, two)),
    )
    torch.testing.assert_close(found[ids[0]], first[VOCABULARY])
    torch.testing.assert_close(found[ids[1]], second[VOCABULARY])


@pytest.mark.parametrize("heads", [None, ["lm_head"], ["embed_tokens"]])
def test_an_adapter_of_a_vision_language_model_finds_its_weights(tmp_path: Path, heads: list[str] | None) -> None:
    """Its modules are nested otherwise in memory than in the file."""
    auto: Any = AutoModelForImageTextToText
    base = save(llava(), tmp_path / "base")
    targets = r".*(language_model|vision_tower).*(q_proj|v_proj)"
    adapted = get_peft_model(auto.from_pretrained(base), LoraConfig(r=2, target_modules=targets, modules_to_save=heads))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    adapted.save_pretrained(tmp_path / "adapter")
    value = {"models": [f"{base}+{tmp_path / 'adapter'}"]}
    write_merged_model(prepare_merge(MergeConfig.model_validate(value)), tmp_path / "out", "a card")
    with silence_transformers():
        found = auto.from_pretrained(tmp_path / "out")
        wanted = PeftModel.from_pretrained(auto.from_pretrained(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-4, atol=1e-5)
    merged, state = wanted.merge_and_unload().state_dict(), found.state_dict()
    assert any("vision_tower" in name for name in state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-4, atol=1e-6)


def test_adapters_of_other_tokens_are_not_merged_by_the_numbers_of_their_rows(tmp_path: Path) -> None:
    _, one = grown(tmp_path, "one", "<call>", tie=False)
    _, two = grown(tmp_path, "two", "<think>", tie=False)
    with pytest.raises(ModelError, match=r"two has 1 tokens that .*one lacks, lacks 1 and numbers 0 diff"):
        merge_adapters([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_the_same_tokens_keep_their_tokenizer(tmp_path: Path) -> None:
    base, one = grown(tmp_path, "one", "<call>", tie=False)
    merge_adapters([one, one], tmp_path / "out")
    with silence_transformers():
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("<call>")["input_ids"] == [VOCABULARY]
    found, wanted = (
        by_fedtune(f"{base}+{folder}", tmp_path / f"{folder.name}-m") for folder in (tmp_path / "out", one)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_adapters_without_rows_of_tokens_may_have_other_tokenizers(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    folders = [trained(base, tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    save_tokenizer(folders[0], words())
    save_tokenizer(folders[1], words(), ("<more>",))
    merge_adapters(folders, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
