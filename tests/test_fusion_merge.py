"""The merge of downloaded fine-tunes: the same numbers as whole tensors in memory, in files that transformers loads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune.merging import ActivationStatistics, MergeContext
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import MergeConfig, parse_merge_config, prepare_merge, write_merged_model
from fedtune.wire import client_update
from tests.fusion_models import base_and_tuned, moved, save, tensors
from tests.tiny import bert, llama


def merged(
    config: MergeConfig,
    folder: Path,
    evidence: MergeContext = MergeContext(),  # noqa: B008 - an immutable value
    shard_size: int = 10**9,
) -> dict[str, Tensor]:
    write_merged_model(prepare_merge(config), folder, "a card", context=evidence, shard_size=shard_size)
    return tensors(folder)


def a_config(
    method: str, models: Sequence[Path], base: Path | None = None, weights: Sequence[float] = (), **keys: object
) -> MergeConfig:
    entries = [{"model": str(model)} for model in models]
    for entry, weight in zip(entries, weights, strict=False):
        entry["parameters"] = {"weight": weight}  # type: ignore[assignment]
    value = {"merge_method": method, "models": entries, "base_model": None if base is None else str(base), **keys}
    return MergeConfig.model_validate(value)


def weighted(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i x_i of whole tensors, in double precision."""
    read = [tensors(folder) for folder in folders]
    return {
        name: sum((w * one[name].double() for w, one in zip(weights, read, strict=True)), torch.zeros(()).double())
        for name in read[0]
    }


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear_is_the_weighted_mean_to_the_last_bit_or_the_rounding_of_fp32(tmp_path: Path, dtype: str) -> None:
    _, *tuned = base_and_tuned(tmp_path)
    found = merged(a_config("linear", tuned, weights=[1, 2, 5], dtype=dtype), tmp_path / "out")
    wanted = weighted(tuned, [1 / 8, 2 / 8, 5 / 8])
    for name, one in wanted.items():
        if dtype == "float32":
            assert float((found[name] - one).abs().max() / one.abs().max()) < 1.2e-7
        else:
            assert torch.equal(found[name], one.float().to(getattr(torch, dtype)))


def test_task_arithmetic_adds_to_the_base(tmp_path: Path) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    found = merged(a_config("task_arithmetic", tuned, base, [0.5, 0.3, -0.2]), tmp_path / "out")
    wanted = weighted([base, *tuned], [1 - 0.6, 0.5, 0.3, -0.2])
    assert all((found[name] - one.float()).abs().max() < 1e-6 for name, one in wanted.items())


METHODS = ["linear", "ties", "dare_ties", "breadcrumbs", "sce", "model_stock", "karcher", "geometric-median"]


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_how_much_is_held_at_a_time(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = base_and_tuned(tmp_path, dtype=torch.bfloat16)
    whole = merged(a_config(method, tuned, base, [0.5, 0.3, 0.4]), tmp_path / "whole")
    monkeypatch.setattr(client_update, "_PIECE", 50)
    pieces = merged(a_config(method, tuned, base, [0.5, 0.3, 0.4]), tmp_path / "pieces")
    for name, tensor in whole.items():
        if method in METHODS[-3:]:  # their inner products are sums, whose order the pieces set
            torch.testing.assert_close(tensor, pieces[name], rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(tensor, pieces[name]), name


def test_merging_one_model_with_itself_gives_its_bits(tmp_path: Path) -> None:
    base, tuned = base_and_tuned(tmp_path, 1, torch.bfloat16)
    for method in ("linear", "slerp", "ties", "task_arithmetic"):
        weights = [0.5, 0.5]
        found = merged(
            a_config(method, [tuned, tuned], base, weights, parameters={"density": 1.0} if method == "ties" else {}),
            tmp_path / method,
        )
        assert all(torch.equal(found[name], one) for name, one in tensors(tuned).items()), method


def test_slerp_leads_from_the_base_to_the_other(tmp_path: Path) -> None:
    base, tuned = base_and_tuned(tmp_path, 1)
    for t, end in ((0.0, base), (1.0, tuned)):
        found = merged(a_config("slerp", [tuned, base], base, parameters={"t": t}), tmp_path / f"out{t}")
        assert all((found[name] - one).abs().max() < 1e-6 for name, one in tensors(end).items())


YAML = """
merge_method: {method}
base_model: {base}
models:
  - model: {one}
    parameters:
      weight:
        - filter: self_attn
          value: 1.0
        - filter: mlp
          value: [0, 1]
        - value: 0.25
  - model: {two}
    parameters:
      weight: 0.5
"""


def test_weights_follow_filters_and_depth(tmp_path: Path) -> None:
    base, one, two = base_and_tuned(tmp_path, 2)
    text = YAML.format(method="task_arithmetic", base=base, one=one, two=two)
    found = merged(parse_merge_config(text, "merge.yaml"), tmp_path / "out")
    deltas = [{name: tensor - tensors(base)[name] for name, tensor in tensors(model).items()} for model in (one, two)]
    for name, before in tensors(base).items():
        first = 1.0 if "self_attn" in name else float("layers.1." in name) if "mlp" in name else 0.25
        wanted = before + first * deltas[0][name] + 0.5 * deltas[1][name]
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)


def test_a_models_own_density_goes_before_that_of_all(tmp_path: Path) -> None:
    base, one, two = base_and_tuned(tmp_path, 2)
    text = f"""
merge_method: dare_linear
base_model: {base}
parameters: {{density: 0.5, rescale: false}}
models:
  - model: {one}
    parameters: {{density: 1.0, weight: 1}}
  - model: {two}
    parameters: {{density: 0.3, weight: 0}}
"""
    found = merged(parse_merge_config(text, "merge.yaml"), tmp_path / "out")
    assert all((found[name] - tensor).abs().max() < 1e-6 for name, tensor in tensors(one).items())


def stacked(one: Path, two: Path) -> str:
    return f"""
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}]
  - sources: [{{model: {two}, layer_range: [1, 2]}}]
"""


def test_layers_are_stacked(tmp_path: Path) -> None:
    _, one, two = base_and_tuned(tmp_path, 2, torch.bfloat16)
    found = merged(parse_merge_config(stacked(one, two), "stack.yaml"), tmp_path / "out")
    first, second = tensors(one), tensors(two)
    for name, tensor in found.items():
        if name.startswith("model.layers."):
            number = int(name.split(".")[2])
            source, own = (first, number) if number < 2 else (second, 1)
            assert torch.equal(tensor, source[name.replace(f".{number}.", f".{own}.", 1)])
    assert torch.equal(found["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], second["model.norm.weight"])
    with silence_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 3


def test_slices_are_merged_layer_by_layer(tmp_path: Path) -> None:
    _, one, two = base_and_tuned(tmp_path, 2)
    text = f"""
merge_method: slerp
base_model: {one}
slices:
  - sources: [{{model: {one}, layer_range: [0, 1]}}, {{model: {two}, layer_range: [1, 2]}}]
    parameters: {{t: 1}}
  - sources: [{{model: {one}, layer_range: [1, 2]}}, {{model: {two}, layer_range: [0, 1]}}]
parameters: {{t: 0}}
"""
    found = merged(parse_merge_config(text, "slices.yaml"), tmp_path / "out")
    first, second = tensors(one), tensors(two)
    for name in (name for name in found if ".layers." in name):
        wanted = second[name.replace(".0.", ".1.")] if ".layers.0." in name else first[name]
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)


def _with_info(auto: Any, folder: Path) -> Any:
    return auto.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("tie", [False, True])
def test_the_result_loads_in_plain_transformers(tmp_path: Path, tie: bool) -> None:
    base, *tuned = base_and_tuned(tmp_path, tie_word_embeddings=tie)
    merged(a_config("ties", tuned, base), tmp_path / "out")
    with silence_transformers():
        loaded, info = _with_info(AutoModelForCausalLM, tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tokenizer("word3 word5")["input_ids"] == [3, 5]
    names = tensors(tmp_path / "out").keys()
    assert ("lm_head.weight" in names) != tie
    assert bool(loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_model_that_is_untied_unties_the_result(tmp_path: Path) -> None:
    one = save(llama(tie_word_embeddings=True), tmp_path / "tied")
    two = save(moved(llama(1, tie_word_embeddings=False), 1), tmp_path / "untied")
    found = merged(a_config("linear", [one, two]), tmp_path / "out")
    head = (tensors(one)["model.embed_tokens.weight"] + tensors(two)["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], head)
    with silence_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, found["lm_head.weight"])


def test_shards_have_an_index_and_the_same_tensors(tmp_path: Path) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    one = merged(a_config("ties", tuned, base), tmp_path / "one")
    many = merged(a_config("ties", tuned, base), tmp_path / "many", shard_size=6000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    with silence_transformers():
        AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_integers_are_the_bases_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, *tuned = base_and_tuned(tmp_path, 2)
    for place, folder in enumerate([base, *tuned]):
        counted = {**tensors(folder), "model.count": torch.tensor(place + 7)}
        save_file(counted, folder / "model.safetensors", {"format": "pt"})
    assert merged(a_config("ties", tuned, base), tmp_path / "out")["model.count"].item() == 7
    assert merged(a_config("linear", tuned), tmp_path / "mean")["model.count"].item() == 8


def test_a_head_that_the_base_has_not_is_averaged(tmp_path: Path) -> None:
    base = save(bert().bert, tmp_path / "base")
    tuned = [save(moved(bert(), seed), tmp_path / f"tuned{seed}") for seed in (1, 2)]
    found = merged(a_config("task_arithmetic", tuned, base, [1, 3]), tmp_path / "out")
    wanted = weighted(tuned, [0.25, 0.75])["classifier.weight"].float()
    assert torch.equal(found["classifier.weight"], wanted)
    name = "encoder.layer.0.output.dense.weight"
    before, (one, two) = tensors(base)[name], (tensors(folder)[f"bert.{name}"] for folder in tuned)
    torch.testing.assert_close(found[f"bert.{name}"], before + (one - before) + 3 * (two - before))
    with silence_transformers():
        _, info = _with_info(AutoModelForSequenceClassification, tmp_path / "out")
    assert not info["missing_keys"]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_relaxing_scales_what_the_merge_changed_of_the_base(tmp_path: Path, method: str) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    plain = merged(a_config(method, tuned, base), tmp_path / "plain")
    half = merged(a_config(method, tuned, base, relax=[{"shrink": {"factor": 0.5}}]), tmp_path / "half")
    before = tensors(base)
    for name, tensor in plain.items():
        if "proj" in name:
            torch.testing.assert_close(half[name], before[name] + 0.5 * (tensor - before[name]), rtol=0, atol=1e-6)


def test_aim_follows_the_activity_of_the_base(tmp_path: Path) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    level = torch.linspace(1, 0, 16)
    evidence = MergeContext({name: ActivationStatistics(level)})
    plain = merged(a_config("ties", tuned, base), tmp_path / "plain")
    found = merged(a_config("ties", tuned, base, relax=[{"aim": {"omega": 0.4}}]), tmp_path / "out", evidence)
    before = tensors(base)[name]
    torch.testing.assert_close(found[name] - before, (plain[name] - before) * (1 - 0.6 * level), rtol=0, atol=1e-6)


def test_the_file_is_written_as_safetensors_reads_it(tmp_path: Path) -> None:
    _, *tuned = base_and_tuned(tmp_path, 2)
    merged(a_config("linear", tuned), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_the_order_of_models_does_not_matter(tmp_path: Path) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    there: Mapping[str, Tensor] = merged(a_config("ties", tuned, base), tmp_path / "there")
    back = merged(a_config("ties", tuned[::-1], base), tmp_path / "back")
    assert all((there[name] - back[name]).abs().max() < 1e-6 for name in there)
