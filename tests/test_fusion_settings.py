"""Configurations that are valid in mergekit, read with its meaning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.errors import ModelError, RecipeError
from fedtune.offline_merge import compare_models, parse_merge_config, prepare_merge, write_merged_model
from fedtune.offline_merge.layered_parameters import resolve_value
from fedtune.offline_merge.write_model import ignore_progress
from tests.fusion_models import base_and_tuned, tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base of four layers and two fine-tunes."""
    return base_and_tuned(tmp_path_factory.mktemp("models"), 2, num_hidden_layers=4)


def merged(folders: list[Path], tmp_path: Path, text: str) -> dict[str, Tensor]:
    """The result of a configuration in which A and B are the fine-tunes and BASE the base."""
    prepared = prepare_merge(parse_merge_config(named(folders, text), "merge.yaml"))
    compare_models(prepared, ignore_progress)
    write_merged_model(prepared, tmp_path / "out", "a card")
    return tensors(tmp_path / "out")


def named(folders: list[Path], text: str) -> str:
    for word, folder in zip(("BASE", "ONE", "TWO"), folders, strict=True):
        text = text.replace(word, str(folder))
    return text


MIDDLE = ".layers.1.mlp.up_proj.weight"


WEIGHTS = "models:\n  - {model: ONE, parameters: {weight: %s}}\n  - {model: TWO, parameters: {weight: %s}}\n"
SAME: dict[str, tuple[str, str]] = {
    "numbers without a point": (WEIGHTS % ("[5e-1, 1]", "5e-1"), WEIGHTS % ("[0.5, 1.0]", "0.5")),
    "one filter that is no list": (
        WEIGHTS % ("{filter: weight, value: 3}", 1),
        WEIGHTS % ("[{filter: weight, value: 3}]", 1),
    ),
    "one value that is no list": (WEIGHTS % ("{value: 3}", 1), WEIGHTS % (3, 1)),
    "an empty list": (WEIGHTS % ("[]", 3), WEIGHTS % (1, 3)),
    "no parameters": (
        "models: [{model: ONE, parameters: null}, TWO]\nparameters: null\n",
        "models: [ONE, TWO]\n",
    ),
    "a model as a mapping": (
        "models: [{model: {model: {path: ONE}}}, {model: {model: TWO}}]\n",
        "models: [ONE, TWO]\n",
    ),
    "a path as a mapping": ("models: [{model: {path: ONE}}, TWO]\n", "models: [ONE, TWO]\n"),
    "a document with marks": ("---\nmodels: [ONE, TWO]\n...\n", "models: [ONE, TWO]\n"),
    "an empty document after it": ("models: [ONE, TWO]\n---\n", "models: [ONE, TWO]\n"),
    "one module by its name": ("modules: {default: {models: [ONE, TWO]}}\n", "models: [ONE, TWO]\n"),
}


@pytest.mark.parametrize("what", SAME)
def test_two_spellings_are_one_merge(folders: list[Path], tmp_path: Path, what: str) -> None:
    one, other = (parse_merge_config(named(folders, text), "merge.yaml").model_dump() for text in SAME[what])
    first, second = (merged(folders, tmp_path / str(place), text) for place, text in enumerate(SAME[what]))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    if "list" not in what and "one value" not in what:
        assert one == other


def test_a_path_with_the_name_of_a_key_in_it_is_a_path() -> None:
    text = "models: [the_parameters_of_a, {model: b, parameters: }, {model: c, statistics: }]\n"
    assert parse_merge_config(text, "merge.yaml").model_names == ["the_parameters_of_a", "b", "c"]


def test_a_base_as_a_mapping_and_an_adapter_beside_a_model_are_read() -> None:
    text = "models: [{model: {model: {path: a}, lora: {path: b}}}]\nbase_model: {model: {path: a, revision: r1}}\n"
    config = parse_merge_config(text, "merge.yaml")
    assert config.model_names == ["a+b"]
    assert config.base_model == "a@r1"


@pytest.mark.parametrize("models", ["[ONE, TWO]", "[ONE, TWO, BASE]"])
def test_model_stock_of_two_fine_tunes_and_a_base(folders: list[Path], tmp_path: Path, models: str) -> None:
    found = merged(folders, tmp_path, f"merge_method: model_stock\nbase_model: BASE\nmodels: {models}\n")
    base, one, two = (tensors(folder) for folder in folders)
    for name, tensor in found.items():
        x, y = (side[name].double() - base[name].double() for side in (one, two))
        cosine = (x * y).sum() / (x.norm() * y.norm()) if x.norm() * y.norm() else torch.zeros(()).double()
        t = max(0.0, float(2 * cosine / (1 + cosine)))
        torch.testing.assert_close(tensor, (base[name] + t * (x + y) / 2).float(), rtol=0, atol=1e-6)


def test_slerp_leads_from_the_base_to_the_one_model_named(folders: list[Path], tmp_path: Path) -> None:
    text = "merge_method: slerp\nbase_model: BASE\nmodels: [%s]\nparameters: {t: 0.3}\n"
    short = merged(folders, tmp_path / "short", text % "ONE")
    long = merged(folders, tmp_path / "long", text % "ONE, BASE")
    assert all(torch.equal(short[name], tensor) for name, tensor in long.items())
    assert not torch.equal(short["model.norm.weight"], tensors(folders[0])["model.norm.weight"])


@pytest.mark.parametrize(
    ("method", "parameters", "counts"),
    [("karcher", "", True), ("linear", "parameters: {weight: 1}\n", True), ("linear", "", False)],
)
def test_a_base_named_only_as_such_counts_where_mergekit_counts_it(
    folders: list[Path], tmp_path: Path, method: str, parameters: str, counts: bool
) -> None:
    """mergekit 0.1.5 gives each of the three a third; where no weight is said for the base, it refuses linear."""
    text = f"merge_method: {method}\nbase_model: BASE\nmodels: [ONE, TWO]\n{parameters}"
    found = merged(folders, tmp_path, text)[f"model{MIDDLE}"]
    sides = torch.stack([tensors(folder)[f"model{MIDDLE}"].flatten() for folder in folders]).double().T
    shares = torch.linalg.lstsq(sides, found.flatten().double()[:, None]).solution.flatten()
    wanted = [1 / 3] * 3 if counts else [0, 0.5, 0.5]
    torch.testing.assert_close(shares, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=2e-2)


THINNING = ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"]


@pytest.mark.parametrize("method", THINNING)
@pytest.mark.parametrize("where", ["parameters: {density: %s}\n", ""])
def test_a_density_of_zero_gives_the_base_and_of_one_the_model(
    folders: list[Path], tmp_path: Path, method: str, where: str
) -> None:
    entry = "{model: ONE}" if where else "{model: ONE, parameters: {density: %s}}"
    text = f"merge_method: {method}\nbase_model: BASE\nmodels: [{entry}]\n{where}"
    for density, end in ((0, 0), (1, 1), ("0.0", 0)):
        found = merged(folders, tmp_path / str(density), text % density)
        for name, tensor in tensors(folders[end]).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_one_model_of_nothing_leaves_the_others(folders: list[Path], tmp_path: Path) -> None:
    text = (
        "merge_method: ties\nbase_model: BASE\nmodels:\n  - {model: ONE, parameters: {density: 0}}\n"
        "  - {model: TWO, parameters: {density: 1}}\n"
    )
    found = merged(folders, tmp_path, text)
    for name, tensor in tensors(folders[2]).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_slice_of_no_layers_brings_what_is_outside(folders: list[Path], tmp_path: Path) -> None:
    text = (
        "merge_method: passthrough\nslices:\n  - sources: [{model: ONE, layer_range: [2, 2]}]\n"
        "  - sources: [{model: TWO, layer_range: [0, 3]}]\n"
    )
    found, one, two = merged(folders, tmp_path, text), tensors(folders[1]), tensors(folders[2])
    assert torch.equal(found["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert {name.split(".")[2] for name in found if ".layers." in name} == {"0", "1", "2"}
    assert all(torch.equal(tensor, two[name]) for name, tensor in found.items() if ".layers." in name)


def test_slices_of_nothing_at_all_are_refused(folders: list[Path], tmp_path: Path) -> None:
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: ONE, layer_range: [2, 2]}]\n"
    with pytest.raises(ModelError, match=r"^the slices have no layer at all; take some$"):
        merged(folders, tmp_path, text)


def test_the_only_layer_of_a_slice_is_its_last(folders: list[Path], tmp_path: Path) -> None:
    text = (
        "merge_method: linear\nslices:\n  - sources:\n"
        "      - {model: ONE, layer_range: [1, 2], parameters: {weight: [1, 0]}}\n"
        "      - {model: TWO, layer_range: [1, 2], parameters: {weight: [0, 1]}}\n"
    )
    found = merged(folders, tmp_path, text)
    name = "mlp.up_proj.weight"
    assert torch.equal(found[f"model.layers.0.{name}"], tensors(folders[2])[f"model.layers.1.{name}"])


def test_filters_in_slices_meet_the_names_in_the_models(folders: list[Path], tmp_path: Path) -> None:
    """Layer 3 of the models is layer 0 of the result: mergekit asks the filter about layer 3."""
    text = (
        "merge_method: linear\nslices:\n  - sources:\n"
        "      - {model: ONE, layer_range: [3, 4], parameters: {weight: [{filter: layers.3., value: 0}, {value: 1}]}}\n"
        "      - {model: TWO, layer_range: [3, 4]}\n"
        "parameters: {weight: [{filter: layers.3., value: 2}, {value: 1}]}\n"
    )
    found = merged(folders, tmp_path, text)
    wanted = tensors(folders[2])
    assert all(torch.equal(found[name], wanted[name.replace(".0.", ".3.")]) for name in found if ".layers." in name)


@pytest.mark.parametrize(
    ("setting", "at", "value"),
    [
        ([True, False], 0.4, True),
        ([True, False], 1.0, False),
        (["row", "tensor"], 0.9, "row"),
        ([0.0, 1.0], 0.25, 0.25),
        ([0, 4, 0], 0.75, 2.0),
        ([], 0.5, None),
    ],
)
def test_values_over_the_depth(setting: list[Any], at: float, value: object) -> None:
    assert resolve_value(setting, "weight", at) == value


@pytest.mark.parametrize("number", [".inf", ".nan", "inf", "nan", "1e999"])
def test_a_weight_that_is_no_finite_number_is_refused(number: str) -> None:
    with pytest.raises(RecipeError, match=r"merge.yaml, line 1: models.0.parameters.weight: .* write a finite one"):
        parse_merge_config(f"models: [{{model: a, parameters: {{weight: {number}}}}}]\n", "merge.yaml")


def test_a_weight_in_words_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="parameters: weight is 'much', but must be a number"):
        merged(folders, tmp_path, "models: [{model: ONE, parameters: {weight: much}}, TWO]\n")


def test_more_modules_than_one_are_refused() -> None:
    text = "modules: {text: {models: [a]}, vision: {models: [b]}}\n"
    with pytest.raises(RecipeError, match=r"modules: only one module is merged at a time; .* models or slices"):
        parse_merge_config(text, "merge.yaml")


def test_a_slice_that_ends_where_it_begins_is_told(folders: list[Path]) -> None:
    sources = "".join(f"  - sources: [{{model: ONE, layer_range: {part}}}]\n" for part in ([0, 1], [1, 1]))
    prepared = prepare_merge(
        parse_merge_config(named(folders, f"merge_method: passthrough\nslices:\n{sources}"), "merge.yaml")
    )
    said = f"layer_range [1, 1] of {folders[1]} holds no layer, as its end is not counted; [1, 2] is layer 1"
    assert prepared.warnings == [said]


def test_a_weight_that_is_not_said_of_every_tensor_is_refused(folders: list[Path]) -> None:
    text = named(folders, WEIGHTS % ("[{filter: q_proj, value: 1}END]", 1))
    with pytest.raises(RecipeError, match=r"^parameters: weight says nothing of .*; end its list with {value: \.\.\.}"):
        prepare_merge(parse_merge_config(text.replace("END", ""), "merge.yaml"))
    prepare_merge(parse_merge_config(text.replace("END", ", {value: 0.5}"), "merge.yaml"))
