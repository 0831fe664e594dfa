"""GGUF files as sources of paged weights: their blocks are read as they are, with the bits of the dequantised model."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from fedtune import models
from fedtune.errors import SourceError
from fedtune.models.paging.paged_layers import list_paged_layers
from fedtune.recipe.schema import ModelSettings
from tests.families import FAMILIES
from tests.gguf_files import write_gguf
from tests.paged_models import take_step
from tests.technique_steps import LANGUAGE, shared
from tests.tiny import llama


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(file: Path, paged: bool | str) -> Any:
    return models.load_model(ModelSettings(source=f"gguf:{file}", paged=paged), LANGUAGE, (), seed=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_a_step_has_the_bits_of_the_dequantised_model(kind: str, tmp_path: Path, cache: Path) -> None:
    tied = kind == "Q8_0"
    plain = llama(vocab_size=50, hidden_size=32, intermediate_size=64, num_key_value_heads=1, tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", plain, gguf.GGMLQuantizationType[kind])
    paged = load(tmp_path / "tiny.gguf", True)
    assert {layer.matrix.form for _, layer in list_paged_layers(paged)} == {"fp16" if kind == "F16" else kind.lower()}
    assert [folder.name[-7:] for folder in (cache / "gguf").glob("[!.]*")] == ["-blocks"], "nothing was dequantised"
    steps = []
    for model in (paged, load(tmp_path / "tiny.gguf", False)):
        shared("lora", model, LANGUAGE)
        steps.append(take_step(FAMILIES["llama"], model))
    assert steps[0].keys() == steps[1].keys()
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    ids = [models.load_tokenizer(ModelSettings(source=f"gguf:{tmp_path / 'tiny.gguf'}", paged=one)) for one in (0, 1)]
    assert ids[0]("abc!")["input_ids"] == ids[1]("abc!")["input_ids"]


def test_blocks_are_converted_a_few_rows_at_a_time_where_another_format_is_asked_for(tmp_path: Path) -> None:
    plain = llama(vocab_size=50, hidden_size=32, intermediate_size=64)
    write_gguf(tmp_path / "tiny.gguf", plain, gguf.GGMLQuantizationType.Q4_0)
    exact, rounded = (dict(list_paged_layers(load(tmp_path / "tiny.gguf", paged))) for paged in ("fp32", "nf4"))
    blocks = dict(list_paged_layers(load(tmp_path / "tiny.gguf", True)))
    for name, layer in blocks.items():
        assert torch.equal(exact[name].matrix.copy_whole(), layer.matrix.copy_whole())
        end = name in ("lm_head", "model.embed_tokens")
        assert torch.equal(rounded[name].matrix.copy_whole(), layer.matrix.copy_whole()) == end


def test_what_is_no_gguf_file_or_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(SourceError, match=r"is not a GGUF file; check model\.source"):
        load(tmp_path / "no.gguf", True)
    with pytest.raises(SourceError, match="there is no file"):
        load(tmp_path / "missing.gguf", True)
    write_gguf(tmp_path / "tiny.gguf", llama(vocab_size=50, hidden_size=32), gguf.GGMLQuantizationType.Q8_0)
    content = (tmp_path / "tiny.gguf").read_bytes()
    for size in (len(content) - 5000, 30):
        (tmp_path / "tiny.gguf").write_bytes(content[:size])
        with pytest.raises(SourceError, match=r"tiny\.gguf cannot be read as a language model: .+; use a safetensors"):
            load(tmp_path / "tiny.gguf", True)
