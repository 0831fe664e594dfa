"""Folders as people have them: files left behind by another save, weights that are codes, buffers of older releases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.offline_merge import compare_models, parse_merge_config, prepare_merge, write_merged_model
from fedtune.offline_merge.write_model import ignore_progress
from tests.fusion_models import base_and_tuned, change_json, moved, save, tensors
from tests.tiny import llama

INDEX = "model.safetensors.index.json"


def merged(folder: Path, text: str) -> Path:
    """All of the command but the showing."""
    prepared = prepare_merge(parse_merge_config(text, "merge.yaml"))
    compare_models(prepared, ignore_progress, trust_base=True)
    write_merged_model(prepared, folder / "out", "a card")
    return folder / "out"


def both(folder: Path, *names: str) -> str:
    return f"models: [{', '.join(str(folder / name) for name in names)}]\n"


def write(folder: Path, found: dict[str, Tensor], file: str = "model.safetensors") -> None:
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / file, {"format": "pt"})


def in_shards(folder: Path) -> list[Path]:
    """The first fine-tune saved again in shards."""
    (folder / "tuned1" / "model.safetensors").unlink()
    save(moved(llama(), 1), folder / "tuned1", max_shard_size="4KB")
    return sorted((folder / "tuned1").glob("model-*.safetensors"))


def a_single_file_too(folder: Path) -> None:
    in_shards(folder)
    write(folder / "tuned1", tensors(folder / "tuned2"))


def without_index(folder: Path) -> None:
    in_shards(folder)[-1].unlink()
    (folder / "tuned1" / INDEX).unlink()


def another_format_too(folder: Path) -> None:
    in_shards(folder)
    (folder / "tuned1" / INDEX).unlink()
    write(folder / "tuned1", tensors(folder / "tuned2"), "consolidated.safetensors")


def twice(folder: Path) -> None:
    first = in_shards(folder)[0]
    found = load_file(first)
    write(folder / "tuned1", {**found, "model.norm.weight": torch.ones(16)}, first.name)


def lacking(folder: Path) -> None:
    for file in in_shards(folder):
        found = load_file(file)
        if found.pop("model.norm.weight", None) is not None:
            write(folder / "tuned1", {**found, "left": torch.ones(1)}, file.name)


def index_of(value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        in_shards(folder)
        (folder / "tuned1" / INDEX).write_text(json.dumps({"weight_map": value}))

    return spoil


def in_codes(beside: str | None, dtype: torch.dtype, told: dict[str, Any] | None = None) -> Callable[[Path], None]:
    """Projections as codes with one scale each."""

    def spoil(folder: Path) -> None:
        found = {}
        for name, tensor in tensors(folder / "tuned1").items():
            coded = "_proj" in name
            found[name] = (tensor / tensor.abs().max() * 100).to(dtype) if coded else tensor
            if coded and beside is not None:
                found[name.removesuffix(".weight") + beside] = tensor.abs().max() / 100
        write(folder / "tuned1", found)
        if told is not None:
            change_json(folder / "tuned1" / "config.json", told)

    return spoil


def in_integers(folder: Path) -> None:
    write(folder / "tuned2", {**tensors(folder / "tuned2"), "model.norm.weight": torch.ones(16, dtype=torch.int64)})


def broken_tokens(folder: Path) -> None:
    (folder / "tuned1" / "tokenizer.json").write_text("{}")


def unreadable_tokens(folder: Path) -> None:
    for name in ("tuned1", "tuned2"):
        (folder / name / "tokenizer.json").unlink()
        (folder / name / "spm.model").write_text(name)


def output_alone(folder: Path) -> None:
    found = tensors(folder / "tuned1")
    found.pop("model.embed_tokens.weight")
    write(folder / "tuned1", found)
    change_json(folder / "tuned1" / "config.json", {"tie_word_embeddings": True})


def model_and_adapter(folder: Path) -> None:
    (folder / "tuned1" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


TABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a single file beside the shards of an index": (
        a_single_file_too,
        r"tuned1 holds two models, model\.safetensors and the shards of model\.safetensors\.index\.json; remove the",
    ),
    "a shard that no index misses": (without_index, r"tuned1 lacks shard (\d+) of \1 of model; fetch it again$"),
    "two formats and no index": (
        another_format_too,
        r"tuned1 holds consolidated\.safetensors and model-\d+-of-\d+\.safetensors, and neither .* what is not$",
    ),
    "a tensor in two shards": (twice, r"tuned1 holds model\.norm\.weight twice, in model-.* and model-.*; remove"),
    "a tensor in no shard": (lacking, r"index\.json names model\.norm\.weight, which its shards do not hold; fetch"),
    "an index of nothing": (index_of(None), r"index\.json does not say under weight_map where tensors are; fetch it"),
    "an index of another folder": (index_of({"a": "../b.safetensors"}), r"index\.json does not say under weight_map"),
    "fp8 with scales": (
        in_codes(".weight_scale_inv", torch.float8_e4m3fn),
        r"tuned1 seems quantised \(it holds .*weight_scale_inv\), but config\.json does not say how; take the plain",
    ),
    "int8 with scales": (in_codes(".SCB", torch.int8), r"tuned1 seems quantised \(it holds .*\.SCB\), but config"),
    "int8 alone": (in_codes(None, torch.int8), r"tuned1 seems quantised \(it holds .*_proj\.weight\), but config"),
    "a part's own quantisation": (
        lambda folder: change_json(
            folder / "tuned1" / "config.json", {"text_config": {"quantization_config": {"quant_method": "gptq"}}}
        ),
        r"tuned1 is quantised by gptq, which fedtune cannot undo; take the plain release$",
    ),
    "a quantisation without a name": (
        in_codes(".SCB", torch.int8, {"quantization_config": {"load_in_8bit": True}}),
        r"tuned1 is quantised by a method it does not name, which fedtune cannot undo",
    ),
    "real numbers here, integers there": (
        in_integers,
        r"model\.norm\.weight is int64 in .*tuned2 and float32 in .*tuned1; real numbers and integers do not merge",
    ),
    "a tokenizer of nothing": (broken_tokens, r"tuned1/tokenizer\.json cannot be read as a tokenizer \(.*\); fetch"),
    "old tokenizers that differ and cannot be read": (
        unreadable_tokens,
        r"the tokenizer in .*tuned1 cannot be read \(\w+\); save it with a tokenizer\.json$",
    ),
    "an output that is tied to nothing": (
        output_alone,
        r"tuned1 holds its output's embeddings and not its input's, which they are tied to; load and save it with",
    ),
    "a model and an adapter": (
        model_and_adapter,
        r"tuned1 holds a model \(model\.safetensors\) and an adapter \(adapter_config\.json\); remove the one",
    ),
}


@pytest.mark.parametrize("what", TABLE)
def test_a_folder_that_may_be_read_in_two_ways_is_refused(tmp_path: Path, what: str) -> None:
    base_and_tuned(tmp_path, 2)
    spoil, message = TABLE[what]
    spoil(tmp_path)
    with pytest.raises(FedtuneError, match=message) as refused:
        merged(tmp_path, both(tmp_path, "tuned1", "tuned2"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_shards_of_another_save_that_the_index_does_not_name_are_none_of_the_model(tmp_path: Path) -> None:
    base_and_tuned(tmp_path, 1)
    wanted = tensors(tmp_path / "tuned1")
    in_shards(tmp_path)
    write(tmp_path / "tuned1", {"model.norm.weight": torch.zeros(3)}, "model-00001-of-00002.safetensors")
    found = tensors(merged(tmp_path, both(tmp_path, "tuned1")))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_plain_fp8_is_a_precision_like_others(tmp_path: Path) -> None:
    base_and_tuned(tmp_path, 2)
    in_codes(None, torch.float8_e4m3fn)(tmp_path)
    found = tensors(merged(tmp_path, both(tmp_path, "tuned1") + "dtype: bfloat16\n"))
    for name, tensor in tensors(tmp_path / "tuned1").items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    base_and_tuned(tmp_path, 1)
    (tmp_path / "tuned1").rename(tmp_path / "tuned.gguf")
    torch.save({}, tmp_path / "tuned.gguf" / "pytorch_model.bin")  # what is in safetensors too is no pickle to read
    assert tensors(merged(tmp_path, both(tmp_path, "tuned.gguf"))).keys() == tensors(tmp_path / "base").keys()


def test_a_file_from_a_hub_cache_is_read_through_its_link(tmp_path: Path) -> None:
    base_and_tuned(tmp_path, 2)
    wanted = tensors(tmp_path / "tuned1")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    (tmp_path / "tuned1").rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    found = tensors(merged(tmp_path, both(tmp_path, "models--x/snapshots/abc")))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    (blobs / "model.safetensors").unlink()
    with pytest.raises(FedtuneError, match=r"abc/model\.safetensors is no whole safetensors file .*; fetch it again"):
        prepare_merge(parse_merge_config(both(tmp_path, "models--x/snapshots/abc"), "merge.yaml"))
