"""What one copy of a model holds and another does not, and what lies beside the tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from fedtune.errors import FedtuneError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import parse_merge_config, prepare_merge, write_merged_model
from tests.fusion_models import base_and_tuned, moved, save, tensors
from tests.test_fusion_files import both, merged, unreadable_tokens, write
from tests.test_fusion_stacks import t5


def loading(kind: Any, folder: Path) -> dict[str, Any]:
    """What transformers misses, or does not know, in a folder."""
    with silence_transformers():
        info: dict[str, Any] = kind.from_pretrained(folder, output_loading_info=True)[1]
    return info


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def a_bert(folder: Path, name: str, seed: int) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_hidden_layers=2, vocab_size=40, max_position_embeddings=32)
    return save(moved(BertModel(config), seed), folder / name)


@pytest.mark.parametrize("order", ["old first", "new first"])
@pytest.mark.parametrize("based", [True, False])
def test_positions_that_one_copy_keeps_are_no_difference(tmp_path: Path, order: str, based: bool) -> None:
    """Encoders of older releases keep them, and a prefix that newer ones lack."""
    folders = [a_bert(tmp_path, name, seed) for seed, name in enumerate(("new", "old", "base"))]
    found = tensors(folders[1]) | {"embeddings.position_ids": torch.arange(32)[None]}
    write(folders[1], {f"bert.{name}": tensor for name, tensor in found.items()})
    names = ["old", "new"] if order == "old first" else ["new", "old"]
    text = both(tmp_path, *names) + (f"base_model: {tmp_path / 'base'}\nmerge_method: ties\n" if based else "")
    out = merged(tmp_path, text)
    made = {name.removeprefix("bert."): tensor for name, tensor in tensors(out).items()}
    assert made.keys() == tensors(folders[0]).keys()
    assert not any(loading(AutoModel, out).values())
    if not based:
        for name, tensor in tensors(folders[0]).items():
            torch.testing.assert_close(made[name], (tensor + found[name]) / 2)


def test_masks_that_one_copy_keeps_are_no_difference_and_biases_are(tmp_path: Path) -> None:
    size: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(0)
        save(moved(GPT2LMHeadModel(GPT2Config(**size)), seed), tmp_path / name)
    masks = {
        f"h.{layer}.attn.{name}": tensor
        for layer in range(2)
        for name, tensor in (("bias", torch.ones(1, 1, 32, 32).tril()), ("masked_bias", torch.tensor(-1e4)))
    }
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "one").items()}
    write(tmp_path / "one", plain | masks)
    out = merged(tmp_path, both(tmp_path, "one", "two"))
    assert len(tensors(out)) == len(plain)
    assert not any(loading(AutoModelForCausalLM, out).values())
    write(tmp_path / "one", plain | {"h.0.attn.bias": torch.ones(16)})
    with pytest.raises(FedtuneError, match=r"two has no tensor .*h\.0\.attn\.bias, which .*one has; only models of"):
        prepare_merge(parse_merge_config(both(tmp_path, "one", "two"), "merge.yaml"))


COPIES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "t5": (
        lambda: t5(),
        AutoModelForSeq2SeqLM,
        {f"{part}.embed_tokens.weight": "shared.weight" for part in ("encoder", "decoder")},
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=1, vocab_size=40, max_position_embeddings=32)),
        AutoModelForMaskedLM,
        {
            "cls.predictions.decoder.bias": "cls.predictions.bias",
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        },
    ),
}


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_tied_tensors_that_one_file_holds_are_no_difference(
    tmp_path: Path, kind: str, order: tuple[str, str]
) -> None:
    build, auto, copies = COPIES[kind]
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(0)
        save(moved(build(), seed), tmp_path / name)
    plain = tensors(tmp_path / "one")
    write(tmp_path / "one", plain | {name: plain[source].clone() for name, source in copies.items()})
    out = merged(tmp_path, both(tmp_path, *order))
    assert tensors(out).keys() == plain.keys()
    assert not any(loading(auto, out).values())
    first = next(iter(copies))
    write(tmp_path / "one", plain | {first: plain[copies[first]] + 1})
    with pytest.raises(FedtuneError, match=rf"two has no tensor {first}, which .*one has; only models of one"):
        prepare_merge(parse_merge_config(both(tmp_path, *order), "merge.yaml"))


def test_old_tokenizers_that_are_one_need_no_reader(tmp_path: Path) -> None:
    base_and_tuned(tmp_path, 2)
    unreadable_tokens(tmp_path)
    for name in ("tuned1", "tuned2"):
        (tmp_path / name / "spm.model").write_text("the same")
    out = merged(tmp_path, both(tmp_path, "tuned1", "tuned2"))
    assert (out / "spm.model").read_text() == "the same"


@pytest.mark.parametrize("dense", [True, False])
def test_an_encoder_of_sentences_keeps_its_pooling(tmp_path: Path, dense: bool) -> None:
    for seed, name in enumerate(("one", "two")):
        folder = a_bert(tmp_path, name, seed)
        (folder / "modules.json").write_text('[{"idx": 1, "path": "1_Pooling"}]')
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": not seed}))
        if dense:
            (folder / "2_Dense").mkdir()
            write(folder / "2_Dense", {"linear.weight": torch.ones(3, 16)})
    prepared = prepare_merge(parse_merge_config(both(tmp_path, "one", "two"), "merge.yaml"))
    said = [f"2_Dense of {tmp_path / 'one'} is copied as it is: only transformers are merged"]
    assert prepared.warnings == (said if dense else [])
    write_merged_model(prepared, tmp_path / "out", "a card")
    for file in ("modules.json", "1_Pooling/config.json", *(["2_Dense/model.safetensors"] if dense else [])):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
