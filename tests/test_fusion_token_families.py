"""A tokenizer rule on models that call their embeddings by other names, or have configurations inside one another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5ForConditionalGeneration,
)

from fedtune.errors import ModelError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import parse_merge_config, prepare_merge, write_merged_model
from fedtune.offline_merge.model_config import with_vocabulary
from fedtune.offline_merge.vocabularies import read_vocabulary
from tests.fusion_models import change_json, moved, save_tokenizer, tensors, words
from tests.test_fusion_stacks import bart, llava, t5
from tests.tiny import VOCABULARY, llama

_SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
}


@torch.no_grad()
def untied(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    return model


def modernbert(rows: int) -> PreTrainedModel:
    more: dict[str, Any] = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**_SIZE, **more, vocab_size=rows))


def rwkv(rows: int) -> PreTrainedModel:
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=rows, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32)
    )


BUILDS: dict[str, tuple[Any, str]] = {
    "t5": (lambda rows: t5(vocab_size=rows), "shared.weight"),
    "t5, untied": (lambda rows: untied(t5(vocab_size=rows)), "lm_head.weight"),
    "mamba": (
        lambda rows: MambaForCausalLM(
            MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=rows, pad_token_id=0)
        ),
        "backbone.embeddings.weight",
    ),
    "rwkv": (rwkv, "head.weight"),
    "rwkv, its input": (rwkv, "rwkv.embeddings.weight"),
    "modernbert": (modernbert, "model.embeddings.tok_embeddings.weight"),
    "distilbert": (
        lambda rows: DistilBertForMaskedLM(
            DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=2, max_position_embeddings=32, vocab_size=rows)
        ),
        "distilbert.embeddings.word_embeddings.weight",
    ),
    "bert": (lambda rows: BertForMaskedLM(BertConfig(**_SIZE, vocab_size=rows)), "cls.predictions.bias"),
    "roberta": (lambda rows: RobertaForMaskedLM(RobertaConfig(**_SIZE, vocab_size=rows)), "lm_head.bias"),
    "gpt_neox": (lambda rows: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE, vocab_size=rows)), "gpt_neox.embed_in.weight"),
    "llama": (lambda rows: llama(vocab_size=rows), "lm_head.weight"),
    "llava": (lambda rows: llava(vocab_size=rows), "language_model.model.embed_tokens.weight"),
}


def two(folder: Path, build: Any) -> list[Path]:
    """A model of 40 words, and one with two further ones, numbered in another order."""
    folders = [folder / name for name in ("one", "two")]
    for seed, (path, added) in enumerate(zip(folders, ((), ("<call>", "<think>")), strict=True)):
        torch.manual_seed(seed)
        with silence_transformers():
            moved(build(VOCABULARY + len(added)), seed).save_pretrained(path)
        save_tokenizer(path, words() if not seed else [*words()[:5], *words()[5:][::-1]], added)
    return folders


def merged(folders: list[Path], rule: str = "union") -> Path:
    out = folders[0].parent / "out"
    text = f"models: [{folders[0]}, {folders[1]}]\ntokenizer_source: {rule}\n"
    write_merged_model(prepare_merge(parse_merge_config(text, "merge.yaml")), out, "a card")
    return out


def row(folder: Path, token: str, name: str) -> Tensor:
    known = read_vocabulary(folder)
    assert known is not None
    [full] = [key for key in tensors(folder) if key.endswith(name)]
    return tensors(folder)[full][known[token]]


@pytest.mark.parametrize("kind", BUILDS)
def test_every_family_has_its_rows_in_the_order_of_the_tokens(tmp_path: Path, kind: str) -> None:
    build, name = BUILDS[kind]
    one, other = two(tmp_path, build)
    out = merged([one, other])
    for token in ("word3", "word7", "word39"):
        torch.testing.assert_close(row(out, token, name), (row(one, token, name) + row(other, token, name)) / 2)
    torch.testing.assert_close(row(out, "<think>", name), row(other, "<think>", name))
    sizes = list(_found("vocab_size", json.loads((out / "config.json").read_text())))
    assert VOCABULARY + 2 in sizes
    assert VOCABULARY not in sizes


def _found(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        for inner, found in value.items():
            if inner == key:
                yield found
            yield from _found(key, found)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"vocab_size": 40}, {"vocab_size": 42}),
        ({"text_config": {"vocab_size": 40}}, {"text_config": {"vocab_size": 42}}),
        (  # PaliGemma says another number outside
            {"vocab_size": 99, "text_config": {"vocab_size": 40}, "vision_config": {"vocab_size": 7}},
            {"vocab_size": 99, "text_config": {"vocab_size": 42}, "vision_config": {"vocab_size": 7}},
        ),
        (
            {"vocab_size": 40, "text_config": {"vocab_size": 40}, "audio_config": {"vocab_size": 7}},
            {"vocab_size": 42, "text_config": {"vocab_size": 42}, "audio_config": {"vocab_size": 7}},
        ),
        (
            {"encoder": {"vocab_size": 40}, "decoder": {"vocab_size": 40}},
            {"encoder": {"vocab_size": 42}, "decoder": {"vocab_size": 42}},
        ),
        ({"hidden_size": 3}, {"hidden_size": 3}),
    ],
)
def test_the_number_of_tokens_is_set_wherever_it_is_said(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert with_vocabulary(settings, 42) == wanted


LOADS: dict[str, Any] = {
    "rwkv": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "t5, untied": AutoModelForSeq2SeqLM,
    "modernbert": AutoModelForMaskedLM,
    "distilbert": AutoModelForMaskedLM,
    "llava": AutoModelForImageTextToText,
}


@pytest.mark.parametrize("kind", LOADS)
def test_the_union_loads_in_plain_transformers(tmp_path: Path, kind: str) -> None:
    out = merged(two(tmp_path, BUILDS[kind][0]))
    with silence_transformers():
        model, info = LOADS[kind].from_pretrained(out, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(out)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tokenizer("word3 <think>", return_tensors="pt")["input_ids"]
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    more = {"decoder_input_ids": ids} if kind.startswith("t5") else {}
    with torch.no_grad():
        assert model(input_ids=ids, **more).logits.isfinite().all()


def test_an_output_of_its_own_keeps_a_t5_what_it_was(tmp_path: Path) -> None:
    """T5 scales its last states where its output is the input's, and says so by two keys."""
    folder = two(tmp_path, BUILDS["t5, untied"][0])[0]
    write_merged_model(
        prepare_merge(parse_merge_config(f"models: [{folder}]\n", "m.yaml")), tmp_path / "alone", "a card"
    )
    ids = torch.arange(3, 13)[None]
    found, wanted = (_t5_logits(path, ids) for path in (tmp_path / "alone", folder))
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def _t5_logits(folder: Path, ids: Tensor) -> Tensor:
    with silence_transformers():
        model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    found: Tensor = model(input_ids=ids, decoder_input_ids=ids).logits
    return found


@pytest.mark.parametrize("rule", ["union", "base"])
def test_columns_of_tokens_are_put_in_order_too(tmp_path: Path, rule: str) -> None:
    one, other = two(tmp_path, lambda rows: bart(vocab_size=rows))
    name = "final_logits_bias"
    for place, folder in enumerate((one, other)):
        found = tensors(folder)
        found[name] = torch.arange(found["model.shared.weight"].shape[0])[None] + 100.0 * place
        save_file(found, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    text = f"models: [{one}, {other}]\nbase_model: {one}\ntokenizer_source: {rule}\n"
    write_merged_model(prepare_merge(parse_merge_config(text, "merge.yaml")), out, "a card")
    known = [read_vocabulary(folder) for folder in (out, one, other)]
    ids, first, second = ({} if one is None else one for one in known)
    made = tensors(out)[name]
    assert made.shape == (1, VOCABULARY + (2 if rule == "union" else 0))
    for token in ("word3", "word30"):
        assert made[0, ids[token]] == (first[token] + second[token] + 100) / 2
    assert rule == "base" or made[0, ids["<think>"]] == second["<think>"] + 100
    with silence_transformers():
        _, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not info["mismatched_keys"]


def test_an_unknown_tensor_that_counts_tokens_is_refused(tmp_path: Path) -> None:
    folders = two(tmp_path, lambda rows: llama(vocab_size=rows))
    for folder in folders:
        found = tensors(folder)
        found["model.counts"] = torch.zeros(3, found["lm_head.weight"].shape[0])
        save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"one: model.counts seems to count tokens, in a way that fedtune does"):
        merged(folders)


def test_a_model_without_known_embeddings_is_refused(tmp_path: Path) -> None:
    folders = two(tmp_path, lambda rows: llama(vocab_size=rows))
    for folder in folders:
        found = {
            name.replace("embed_tokens", "table").replace("lm_head", "out"): one
            for name, one in tensors(folder).items()
        }
        save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"one has embeddings of no known rows, which no tokenizer rule can put in order"
    ):
        merged(folders)


def test_special_tokens_are_numbered_as_by_the_model_whose_tokens_are_taken(tmp_path: Path) -> None:
    one, other = two(tmp_path, lambda rows: llava(vocab_size=rows))
    change_json(one / "config.json", {"image_token_id": 39, "pad_token_id": 0})
    change_json(other / "config.json", {"image_token_id": 7, "image_token_index": 7, "pad_token_id": 41})
    (one / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 9}))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 41], "max_length": 5}))
    out = merged([one, other], str(other))
    told = json.loads((out / "config.json").read_text())
    assert (told["image_token_id"], told["pad_token_id"]) == (7, 41)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [4, 41], "max_length": 9}
