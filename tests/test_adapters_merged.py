"""Adapter folders made by peft, merged by their products, and read again by plain peft."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging import ActivationStatistics, CombineStep, MergeContext, MergeInput
from fedtune.merging.relax.aim import Aim
from fedtune.merging.relax.shrink import Shrink
from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge, RankLimit
from fedtune.offline_merge.adapters.merge_adapters import MergedModule, compute_overall_error, merge_adapters
from tests.adapter_folders import (
    IDS,
    PLAIN,
    assert_adds,
    deltas,
    loaded,
    net,
    several,
    step,
    wanted,
    whole,
)

MIXTURES: dict[str, list[dict[str, Any]]] = {
    "alike": [PLAIN, PLAIN, PLAIN],
    "ranks and alphas": [{"r": 1, "lora_alpha": 3}, {"r": 4, "lora_alpha": 2}, PLAIN],
    "rsLoRA": [{"use_rslora": True, "r": 3}, PLAIN, {"use_rslora": True}],
    "patterns": [
        {"rank_pattern": {"^fc": 5}, "alpha_pattern": {"block.fc": 1.5}},
        PLAIN,
        {"rank_pattern": {"kernel": 1}},
    ],
    "patterns and rsLoRA": [
        {"rank_pattern": {"block.fc": 1}, "alpha_pattern": {r".*kernel": 9}, "use_rslora": True, "r": 3},
        {"rank_pattern": {r"^fc": 4}, "use_rslora": True},
        {"alpha_pattern": {"fc": 1}, "lora_alpha": 2},
    ],
    "modules": [
        {"target_modules": ["block.fc"]},
        {"target_modules": ["tokens", "block.kernel"]},
        {"target_modules": "fc"},
    ],
    "regular expressions": [{"target_modules": r"block\.(fc|kernel)"}, PLAIN, PLAIN],
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_linear_merge_is_exact_in_plain_peft(tmp_path: Path, mixture: str) -> None:
    folders = several(tmp_path, *MIXTURES[mixture])
    modules = merge_adapters(folders, tmp_path / "out", AdapterMerge(weights=[3, 2, 5]))
    assert_adds(tmp_path / "out", wanted(folders, [0.3, 0.2, 0.5]))
    assert compute_overall_error(modules) < 1e-6
    assert {one.module: one.rank for one in modules} == ranks(tmp_path / "out")


def ranks(folder: Path) -> dict[str, int]:
    """The ranks a fresh model gets from the configuration, which is all that peft goes by when it loads."""
    layers = loaded(folder).base_model.model.named_modules()
    return {name: layer.r["default"] for name, layer in layers if hasattr(layer, "lora_A")}


def test_the_forward_pass_is_that_of_the_merged_products(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, {"r": 3})
    merge_adapters(folders, tmp_path / "out")
    model = net()
    for name, delta in wanted(folders, [0.5, 0.5]).items():
        model.get_parameter(f"{name}.weight").data += delta.float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def test_equal_adapters_give_that_adapter_at_its_own_rank(tmp_path: Path) -> None:
    [one] = several(tmp_path, PLAIN)
    merge_adapters([one] * 5, tmp_path / "out")
    assert_adds(tmp_path / "out", deltas(one))
    assert set(ranks(tmp_path / "out").values()) == {2}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 6, {})


def test_the_order_of_adapters_and_one_of_weight_zero_do_not_matter(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, {"r": 3}, {"r": 5})
    merge_adapters(folders, tmp_path / "out", AdapterMerge(weights=[1, 3, 0]))
    assert_adds(tmp_path / "out", wanted(folders[1::-1], [0.75, 0.25]))
    merge_adapters(folders[1::-1], tmp_path / "turned", AdapterMerge(weights=[3, 1]))
    assert_adds(tmp_path / "turned", deltas(tmp_path / "out"))


@pytest.mark.parametrize(
    "cut", [RankLimit(rank=1), RankLimit(rank=3), RankLimit(energy=0.8), RankLimit(rank=2, energy=0.5)]
)
def test_what_is_cut_off_is_told(tmp_path: Path, cut: RankLimit) -> None:
    folders = several(tmp_path, PLAIN, PLAIN, {"r": 3})
    modules = merge_adapters(folders, tmp_path / "out", AdapterMerge(limit=cut))
    whole, found = wanted(folders, [1 / 3] * 3), deltas(tmp_path / "out")
    for one in modules:
        missed = (found[one.module] - whole[one.module]).norm() / whole[one.module].norm()
        assert one.error == pytest.approx(float(missed), rel=1e-3, abs=1e-6)
        assert cut.rank is None or one.rank <= cut.rank
        assert cut.energy is None or cut.rank is not None or one.error**2 <= 1 - cut.energy
    squares = [sum(float(one.missed) ** 2 for one in modules), sum(one.whole**2 for one in modules)]
    assert compute_overall_error(modules) == pytest.approx((squares[0] / squares[1]) ** 0.5)
    assert compute_overall_error([MergedModule("a", 1, 0.0, 0.0)]) == 0


STEPS: list[tuple[str, dict[str, Any], int]] = [
    ("linear", {}, 3),
    ("mean", {}, 3),
    ("task-arithmetic", {"scale": 0.7}, 3),
    ("slerp", {"t": 0.3}, 2),
    ("nuslerp", {}, 2),
    ("nuslerp", {"over": "row"}, 2),
    ("multislerp", {}, 3),
    ("karcher", {}, 3),
    ("model-stock", {}, 3),
    ("geometric-median", {"distances": "tensor"}, 3),
    ("geometric-median", {"distances": "model"}, 3),
    ("ties", {"density": 0.4}, 3),
    ("dare-linear", {"density": 0.6}, 3),
]


@pytest.mark.parametrize(("name", "settings", "count"), STEPS)
def test_a_step_does_to_products_what_it_does_to_dense_deltas(
    tmp_path: Path, name: str, settings: dict[str, Any], count: int
) -> None:
    folders = several(tmp_path, PLAIN, {"r": 3}, {"r": 1})[:count]
    weights = [0.5, 0.2, 0.3][:count]
    made = step(name, **settings)
    modules = merge_adapters(folders, tmp_path / "out", AdapterMerge(made, weights))
    assert_adds(tmp_path / "out", dense_twin(made, [by_rows(folder) for folder in folders], weights), 1e-5)
    assert compute_overall_error(modules) < 1e-5


def test_an_adapter_may_have_a_density_of_its_own(tmp_path: Path) -> None:
    folders, weights = several(tmp_path, PLAIN, {"r": 3}), [0.5, 0.5]
    knobs = [{"density": 1.0}, {"density": 0.3}]
    merge_adapters(folders, tmp_path / "out", AdapterMerge(step("ties", density=0.6), weights, overrides=knobs))
    dense = [by_rows(folder) for folder in folders]
    assert_adds(tmp_path / "out", dense_twin(step("ties", density=0.6), dense, weights, knobs), 1e-5)


def by_rows(folder: Path) -> dict[str, Tensor]:
    """Deltas as B A makes them: of embeddings the transpose."""
    return {name: delta.T if name == "tokens" else delta.flatten(1) for name, delta in deltas(folder).items()}


def dense_twin(
    made: CombineStep,
    found: list[dict[str, Tensor]],
    weights: Sequence[float],
    knobs: Sequence[Mapping[str, float]] | None = None,
) -> dict[str, Tensor]:
    operands = [
        MergeInput(lambda name, start, stop, own=own: own[name][start:stop].float(), weight, own_knobs)
        for own, weight, own_knobs in zip(found, weights, knobs or [{}] * len(found), strict=True)
    ]
    shapes = {name: tuple(delta.shape) for name, delta in found[0].items()}
    made, operands = made.bind(shapes, operands, MergeContext())  # type: ignore[assignment]
    merged = {name: torch.cat(list(made.combine(name, shape, operands))).double() for name, shape in shapes.items()}
    merged["tokens"] = merged["tokens"].T
    merged["block.kernel"] = merged["block.kernel"].reshape(6, 1, 3, 3)
    return merged


def test_peft_averages_factors_where_this_averages_products(tmp_path: Path) -> None:
    """Its ``linear`` is off by the cross terms, and K equal adapters at 1 / K come out K times too large."""
    folders = several(tmp_path, PLAIN, PLAIN)
    model = PeftModel.from_pretrained(net(), str(folders[0]), adapter_name="a")
    model.load_adapter(str(folders[1]), "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="linear")
    layer = model.base_model.model.fc
    expected = wanted(folders, [0.5, 0.5])["fc"]
    assert (layer.get_delta_weight("mean") - expected).norm() / expected.norm() > 0.5
    merge_adapters(folders, tmp_path / "out")
    assert_adds(tmp_path / "out", wanted(folders, [0.5, 0.5]))


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["head"]}, {"bias": "all"}, {"use_dora": True, "target_modules": ["block.fc", "fc"]}],
    ids=["head", "biases", "magnitudes"],
)
def test_what_is_no_product_is_averaged_apart(tmp_path: Path, settings: dict[str, Any]) -> None:
    folders = several(tmp_path, settings, {**settings, "r": 3})
    merge_adapters(folders, tmp_path / "out", AdapterMerge(weights=[1, 3]))
    one, other, found = (
        {name: tensor for name, tensor in whole(folder).items() if "embedding" not in name}
        for folder in (*folders, tmp_path / "out")
    )
    assert len(found) >= 2
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * other[name])
    assert loaded(tmp_path / "out")(IDS).isfinite().all()
    if "use_dora" not in settings:
        assert_adds(tmp_path / "out", wanted(folders, [0.25, 0.75]))


def test_a_head_that_one_adapter_alone_has_is_its_own(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, {"modules_to_save": ["head"]})
    merge_adapters(folders, tmp_path / "out")
    name = "base_model.model.head.weight"
    assert torch.equal(whole(tmp_path / "out")[name], whole(folders[1])[name])
    saved = loaded(tmp_path / "out").base_model.model.head.modules_to_save["default"].weight
    assert torch.equal(saved.detach(), whole(folders[1])[name])


def test_half_precision_is_merged_in_double_and_rounded_once(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, PLAIN)
    for folder in folders:
        path = folder / "adapter_model.safetensors"
        half = {name: tensor.half() for name, tensor in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(half, path)
    merge_adapters(folders, tmp_path / "out")
    kept = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    assert_adds(tmp_path / "out", wanted(folders, [0.5, 0.5]), 1e-3)


@pytest.mark.parametrize("what", [".lora_B.weight", ".head."])
def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path, what: str) -> None:
    folders = several(tmp_path, {"modules_to_save": ["head"]}, {"modules_to_save": ["head"]})
    for sign, folder in zip((1, -1), folders, strict=True):
        path = folder / "adapter_model.safetensors"
        found = safetensors.torch.load_file(path)
        half = {
            name: (tensor * (6e4 * sign / tensor.abs().max() if what in name else 1)).half()
            for name, tensor in found.items()
        }
        safetensors.torch.save_file(half, path)
    with pytest.raises(ModelError, match=r"reaches [\d.e+]+, but float16 ends at 65504; take smaller weights"):
        merge_adapters(
            folders,
            tmp_path / "out",
            AdapterMerge(step("task-arithmetic", scale=1e12 if "lora" in what else 1.0), [3, -2]),
        )
    assert not (tmp_path / "out").exists()


def test_aim_scales_the_columns_of_the_merged_product(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, PLAIN)
    level = torch.rand(36, generator=torch.Generator().manual_seed(0))
    channel = torch.tensor([2.0])
    evidence = MergeContext(
        {"fc.weight": ActivationStatistics(level), "block.kernel.weight": ActivationStatistics(channel)}
    )
    merge_adapters(folders, tmp_path / "out", AdapterMerge(relax=[Aim(omega=0.4)], context=evidence))
    expected = wanted(folders, [0.5, 0.5])
    expected["fc"] = expected["fc"] * (1 - 0.6 * level / level.max())
    expected["block.kernel"] = 0.4 * expected["block.kernel"]
    assert_adds(tmp_path / "out", expected)


def test_shrinking_reaches_transposed_factors_too(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, PLAIN)
    merge_adapters(folders, tmp_path / "out", AdapterMerge(relax=[Shrink(factor=0.5)]))
    assert_adds(tmp_path / "out", wanted(folders, [0.25, 0.25]))


def test_an_adapter_of_zeros_stays_one(tmp_path: Path) -> None:
    folders = several(tmp_path, PLAIN, PLAIN)
    modules = merge_adapters([folders[0]] * 2, tmp_path / "out", AdapterMerge(step("task-arithmetic"), [1, -1]))
    assert {(one.rank, one.error) for one in modules} == {(1, 0.0)}
    assert not any(delta.any() for delta in deltas(tmp_path / "out").values())
