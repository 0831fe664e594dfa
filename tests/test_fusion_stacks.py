"""Models of several stacks of layers, and slices that renumber the layers of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fedtune.errors import ModelError, RecipeError
from fedtune.merging import ActivationStatistics, MergeContext
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import compare_models, parse_merge_config, prepare_merge, write_merged_model
from fedtune.offline_merge.evaluate_models import collect_merge_context
from fedtune.offline_merge.layer_names import compute_relative_depths, stacks
from fedtune.offline_merge.write_model import ignore_progress
from fedtune.tasks import get_task
from tests.fusion_models import base_and_tuned, change_json, moved, save, save_tokenizer, tensors, words
from tests.tiny import llama


def t5(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    size: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(**{**size, "num_decoder_layers": 3, "decoder_start_token_id": 0, **settings})
    )


def bart(seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "vocab_size": 40,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": 32,
    }
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("ffn_dim", 32), ("attention_heads", 2))
    }
    return BartForConditionalGeneration(BartConfig(**{**size, **sides, **settings}))


def llava(seed: int = 0, vocab_size: int = 40) -> PreTrainedModel:
    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, num_hidden_layers=3, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**size, num_hidden_layers=2, vocab_size=vocab_size, max_position_embeddings=32)
    sides: dict[str, Any] = {"vision_config": vision, "text_config": text}
    return LlavaForConditionalGeneration(LlavaConfig(**sides, image_token_index=39, vision_feature_layer=-1))


BUILDS: dict[str, Any] = {"t5": t5, "bart": bart, "llava": llava}


def three(folder: Path, build: Any, **settings: Any) -> list[Path]:
    folders = [folder / name for name in ("base", "one", "two")]
    for seed, path in enumerate(folders):
        save(moved(build(0, **settings), seed, 0.1 if seed else 0.0), path)
    return folders


@pytest.mark.parametrize("kind", BUILDS)
def test_slices_of_several_stacks_are_refused(tmp_path: Path, kind: str) -> None:
    _, one, two = three(tmp_path, BUILDS[kind])
    text = stacked((one, [0, 2]), (two, [1, 2]))
    with pytest.raises(
        ModelError, match=r"one has several stacks of layers \(.*, .*\), and slices do not say whose layers"
    ):
        prepare_merge(parse_merge_config(text, "merge.yaml"))


@pytest.mark.parametrize("kind", BUILDS)
def test_values_over_the_depth_run_through_each_stack(tmp_path: Path, kind: str) -> None:
    _, one, two = three(tmp_path, BUILDS[kind])
    entries = [f"{{model: {one}, parameters: {{weight: [0, 1]}}}}", f"{{model: {two}, parameters: {{weight: [1, 0]}}}}"]
    text = f"models: [{', '.join(entries)}]\n"
    write_merged_model(prepare_merge(parse_merge_config(text, "merge.yaml")), tmp_path / "out", "a card")
    found, first, second = (tensors(folder) for folder in (tmp_path / "out", one, two))
    known = stacks(first)
    assert len(known) == 2
    for stack in known:
        own = [name for name in first if name.startswith(f"{stack}.")]
        last = max(int(name.removeprefix(f"{stack}.").split(".")[0]) for name in own)
        assert last in (1, 2)
        for name in own:
            t = int(name.removeprefix(f"{stack}.").split(".")[0]) / last
            torch.testing.assert_close(found[name], t * first[name] + (1 - t) * second[name], rtol=1e-5, atol=1e-6)


def test_whole_merges_of_several_stacks_load(tmp_path: Path) -> None:
    base, one, two = three(tmp_path, t5)
    text = f"merge_method: ties\nbase_model: {base}\nmodels: [{one}, {two}]\n"
    write_merged_model(prepare_merge(parse_merge_config(text, "merge.yaml")), tmp_path / "out", "a card")
    with silence_transformers():
        auto: Any = AutoModelForSeq2SeqLM
        _, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_stacks_are_told_from_steps_of_a_head() -> None:
    layer = ["q.weight", "k.weight", "v.weight"]
    names = [f"model.layers.{number}.{rest}" for number in range(2) for rest in layer]
    head = [f"classifier.{number}.{rest}" for number in (0, 3) for rest in ("weight", "bias")]
    assert stacks([*names, *head, "norm.weight"]) == ["model.layers"]
    assert stacks(head) == ["classifier"]
    assert stacks(["weight"]) == []
    assert compute_relative_depths(names[:3]) == dict.fromkeys(names[:3], 1.0)


def stacked(*parts: tuple[Path, list[int]]) -> str:
    """A passthrough of layers of models."""
    sources = [f"{{sources: [{{model: {folder}, layer_range: {layers}}}]}}" for folder, layers in parts]
    return f"merge_method: passthrough\nslices: [{', '.join(sources)}]\n"


RENUMBERED = """
merge_method: {method}
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [2, 4]}}
      - {{model: {one}, layer_range: [2, 4]}}
      - {{model: {two}, layer_range: [2, 4]}}
  - sources:
      - {{model: {base}, layer_range: [0, 1]}}
      - {{model: {one}, layer_range: [0, 1]}}
      - {{model: {two}, layer_range: [0, 1]}}
"""


def deep(folder: Path) -> list[Path]:
    """A base of four layers that are unlike each other, and two fine-tunes."""
    return base_and_tuned(folder, 2, num_hidden_layers=4)


def test_models_of_slices_are_compared_layer_by_layer(tmp_path: Path) -> None:
    base, one, two = deep(tmp_path)
    text = RENUMBERED.format(method="task_arithmetic", base=base, one=one, two=two)
    plain = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{one}, {two}]\n"
    sliced, whole = (
        compare_models(prepare_merge(parse_merge_config(each, "merge.yaml")), ignore_progress) for each in (text, plain)
    )
    assert sliced == whole


def test_stacked_layers_are_compared_as_the_models_have_them(tmp_path: Path) -> None:
    _, one, two = deep(tmp_path)
    text = stacked((one, [2, 4]), (two, [0, 2]))
    found = compare_models(prepare_merge(parse_merge_config(text, "merge.yaml")), ignore_progress)
    first, second = tensors(one), tensors(two)
    product = sum(float((first[name].double() * second[name]).sum()) for name in first)
    norms = [sum(float(side[name].double().square().sum()) for name in side) ** 0.5 for side in (first, second)]
    assert found.cosines[0][1] == pytest.approx(product / norms[0] / norms[1], rel=1e-5)


def test_a_base_of_another_number_of_layers_is_compared_where_it_has_them(tmp_path: Path) -> None:
    base, one, two = deep(tmp_path)
    short = save(llama(num_hidden_layers=2), tmp_path / "short")
    text = f"""
merge_method: linear
base_model: {base}
slices: [{{sources: [{{model: {one}, layer_range: [3, 4]}}, {{model: {short}, layer_range: [0, 1]}}]}}]
"""
    assert compare_models(
        prepare_merge(parse_merge_config(text, "merge.yaml")), ignore_progress, trust_base=True
    ).models == [
        str(one),
        str(short),
    ]
    assert two.exists()


def test_a_relaxed_layer_follows_the_activity_of_the_bases_layer(tmp_path: Path) -> None:
    base, one, two = deep(tmp_path)
    text = RENUMBERED.format(method="task_arithmetic", base=base, one=one, two=two)
    rest = "self_attn.q_proj.weight"
    levels = {f"model.layers.{number}.{rest}": torch.linspace(1, 0, 16).roll(number) for number in range(4)}
    evidence = MergeContext({name: ActivationStatistics(level) for name, level in levels.items()})
    write_merged_model(prepare_merge(parse_merge_config(text, "merge.yaml")), tmp_path / "plain", "a card")
    write_merged_model(
        prepare_merge(parse_merge_config(text + "relax: {aim: {omega: 0.4}}\n", "merge.yaml")),
        tmp_path / "out",
        "a card",
        context=evidence,
    )
    plain, found, before = (tensors(folder) for folder in (tmp_path / "plain", tmp_path / "out", base))
    for number, own in enumerate((2, 3, 0)):
        name, at = f"model.layers.{number}.{rest}", before[f"model.layers.{own}.{rest}"]
        wanted = at + (plain[name] - at) * (1 - 0.6 * levels[f"model.layers.{own}.{rest}"])
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)


def test_statistics_are_those_of_the_models_own_layer(tmp_path: Path) -> None:
    _, one, two = deep(tmp_path)
    rest, files = "mlp.up_proj.weight", []
    for place, folder in enumerate((one, two)):
        measured = {name: torch.full_like(tensor, 1.0) for name, tensor in tensors(folder).items()}
        for number in range(4):  # layer 3 is known by the first model alone, the others by the second
            measured[f"model.layers.{number}.{rest}"] *= float((number == 3) == (place == 0))
        files.append(tmp_path / f"{place}.safetensors")
        save_file(measured, files[-1])
    sources = ", ".join(
        f"{{model: {folder}, layer_range: [3, 4], statistics: {file}}}"
        for folder, file in zip((one, two), files, strict=True)
    )
    write_merged_model(
        prepare_merge(parse_merge_config(f"merge_method: fisher\nslices: [{{sources: [{sources}]}}]\n", "m.yaml")),
        tmp_path / "out",
        "",
    )
    assert torch.allclose(tensors(tmp_path / "out")[f"model.layers.0.{rest}"], tensors(one)[f"model.layers.3.{rest}"])


@pytest.mark.parametrize(("key", "step"), [("align", "rebasin"), ("renormalise", "repair"), ("renormalise", "reset")])
def test_steps_on_whole_models_are_refused_with_slices(tmp_path: Path, key: str, step: str) -> None:
    base, one, two = deep(tmp_path)
    text = RENUMBERED.format(method="task_arithmetic", base=base, one=one, two=two) + f"{key}: {step}\n"
    with pytest.raises(
        RecipeError, match=f"^{key} needs whole models; give models in place of slices, or leave {key} out"
    ):
        prepare_merge(parse_merge_config(text, "merge.yaml"))


def test_a_result_of_another_shape_than_the_net_is_refused_before_it_is_written(tmp_path: Path) -> None:
    folders = [save(llama(seed, vocab_size=40 + seed), tmp_path / str(seed)) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        save_tokenizer(folder, words(), ("<new>",) * seed)
    config = parse_merge_config(
        f"models: [{folders[0]}, {folders[1]}]\ntokenizer_source: union\nrenormalise: repair\n", "merge.yaml"
    )
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "word3 word4 word5\n" * 8)

    def runs(reference: str) -> Path:
        raise AssertionError(reference)

    with pytest.raises(
        ModelError, match=r"repair watches the result in the net it was given, where .* is \[40, 16\], not"
    ):
        collect_merge_context(prepare_merge(config), get_task("text-generation"), f"csv:{texts}", "text", runs)


def test_what_is_said_of_single_layers_follows_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    net = Qwen3ForCausalLM(
        Qwen3Config(**size, num_hidden_layers=4, layer_types=kinds, sliding_window=8, use_sliding_window=True)
    )
    one = save(net, tmp_path / "one")
    text = stacked((one, [2, 4]), (one, [1, 2]))
    write_merged_model(prepare_merge(parse_merge_config(text, "merge.yaml")), tmp_path / "out", "a card")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["num_hidden_layers"], told["layer_types"]) == (3, [kinds[2], kinds[3], kinds[1]])
    with silence_transformers():
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_lists_that_are_not_of_layers_stay(tmp_path: Path) -> None:
    _, one, _ = base_and_tuned(tmp_path, 2, num_hidden_layers=2)
    told = {"eos_token_id": [1, 2], "mlp_only_layers": [1], "no_rope_layers": [1, 0], "architectures": ["A", "B"]}
    change_json(one / "config.json", told)
    write_merged_model(
        prepare_merge(parse_merge_config(stacked((one, [1, 2]), (one, [0, 2])), "merge.yaml")),
        tmp_path / "out",
        "a card",
    )
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {**told, "mlp_only_layers": [0, 2], "no_rope_layers": [0, 1, 0]}
    assert {key: found[key] for key in wanted} == wanted


def test_a_model_that_does_not_count_its_layers_is_no_source_of_slices(tmp_path: Path) -> None:
    _, one, _ = deep(tmp_path)
    settings = json.loads((one / "config.json").read_text())
    settings.pop("num_hidden_layers")
    (one / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=r"one|tuned1 does not say in config.json how many layers it has; give models in"
    ):
        prepare_merge(parse_merge_config(stacked((one, [0, 2])), "m"))
