"""Rounds, exports and refusals of recipes whose model is paged."""

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtune import models
from fedtune.errors import FedtuneWarning, ModelError
from fedtune.export.export_model import write_export
from fedtune.models.paging import disk_speed
from fedtune.models.paging.disk_speed import warn_of_slow_disk
from fedtune.models.paging.paged_layers import list_paged_layers
from fedtune.recipe.schema import ModelSettings, Recipe
from fedtune.training import get_model_state, prepare_model
from tests.families import FAMILIES
from tests.federations import execute, words
from tests.paged_models import load_family
from tests.technique_steps import IMAGES, shake


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))


def test_rounds_of_a_paged_model_have_the_hashes_and_scores_of_one_in_memory(home: Path, tmp_path: Path) -> None:
    plain = execute(words(tmp_path), run="plain")
    paged = execute(words(tmp_path, "model.paged=true"), run="paged")
    assert paged.hashes == plain.hashes
    own = ("train.optimiser=adamw_8bit", "federation.rounds=1")
    eight_bits = [execute(words(tmp_path, *own, f"model.paged={one}"), run=f"8-{one}") for one in ("true", "false")]
    assert eight_bits[0].hashes == eight_bits[1].hashes
    assert eight_bits[0].hashes[1] != plain.hashes[1]
    assert len(set(paged.hashes)) == 3
    assert [record.metrics for record in paged.rounds] == [record.metrics for record in plain.rounds]


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_an_export_holds_the_weights_of_the_store(form: str, home: Path, tmp_path: Path) -> None:
    written = []
    for paged in ("false", "true"):
        recipe = words(tmp_path, f"model.paged={paged}")
        model, _, shared = prepare_model(recipe, ("bad", "good"), device="cpu")
        shake(model, shared)
        folder = tmp_path / f"out-{paged}"
        write_export(recipe, ("bad", "good"), get_model_state(model, shared), folder, form, "card")  # type: ignore[arg-type]
        written.append(load_file(next(folder.glob("*.safetensors"))))
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])


def test_a_model_goes_to_a_worker_process_without_its_weights(tmp_path: Path) -> None:
    model = load_family("llama", tmp_path / "base", True)
    batch = FAMILIES["llama"].make_batch()
    model.share_memory()
    content = bytes(ForkingPickler.dumps(model))
    assert len(content) < sum(parameter.numel() for parameter in model.parameters())
    again = pickle.loads(content)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(
    ("techniques", "why"),
    [
        ("full", "full trains the weights of the base, which are in a file that is only read"),
        ("deft+lora", "deft was not made for a base whose weights are in a file"),
        ("qlora", "qlora quantises the base in memory; model.paged: nf4 does so in the file"),
    ],
)
def test_techniques_that_need_the_base_in_memory_are_refused(
    techniques: str, why: str, home: Path, tmp_path: Path
) -> None:
    recipe = words(tmp_path, "model.paged=true", f"train.techniques={techniques}")
    with pytest.raises(ModelError, match=f"model.paged: {why}; take lora or meft, or drop model.paged"):
        prepare_model(recipe, ("bad", "good"))


def test_a_merge_that_would_change_the_base_is_refused(home: Path, tmp_path: Path) -> None:
    settings = "{lora: {trained_factors: both-and-base}}"
    recipe = words(tmp_path, "model.paged=int8", f"train.techniques=[{settings}]", "merge=[fedex-lora]")
    with pytest.raises(ModelError, match=r"model\.paged: bert\.\S+\.base_layer\.weight would change, but it is in a"):
        prepare_model(recipe, ("bad", "good"))


def test_bias_and_head_are_trained_in_memory(home: Path, tmp_path: Path) -> None:
    for techniques in ("bias", "head-only"):
        recipe = words(tmp_path, "model.paged=true", f"train.techniques={techniques}")
        _, _, shared = prepare_model(recipe, ("bad", "good"))
        assert "classifier.weight" in shared


def test_recipes_without_paging_are_written_as_before(tmp_path: Path) -> None:
    assert "paged" not in ModelSettings(source="path:x").model_dump()
    assert ModelSettings(source="path:x", paged="nf4").model_dump()["paged"] == "nf4"
    again = Recipe.model_validate_json(words(tmp_path, "model.paged=true").model_dump_json())
    assert again.model.paged is True


def test_a_model_of_convolutions_is_refused(home: Path) -> None:
    settings = ModelSettings(source="sample:logistic", paged=True)
    with pytest.raises(ModelError, match=r"sample:logistic is a model of images, which model\.paged does not read"):
        models.load_model(settings, IMAGES, ("a", "b"), seed=0)


def test_a_slow_disk_is_told_in_seconds_a_step_unless_memory_holds_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    matrices = [layer.matrix for _, layer in list_paged_layers(load_family("llama", tmp_path / "base", True))]
    warn_of_slow_disk(matrices, slow=0)
    assert not recwarn.list
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 0}))
    monkeypatch.setattr(disk_speed, "measure_bytes_per_second", lambda *_: 1000.0)
    size = sum(matrix.nbytes for matrix in matrices)
    with pytest.warns(FedtuneWarning, match=rf"in each step, which takes about {3 * size / 1000:,.0f} seconds at"):
        warn_of_slow_disk(matrices)
