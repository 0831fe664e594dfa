"""Merges that do nothing, or score worse than what they are made of, say so."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fedtune.cli.merge import merge
from fedtune.merging import ActivationStatistics, build_pipeline
from fedtune.offline_merge.merge_warnings import warn_of_better_inputs, warn_of_dominant_channels
from fedtune.recipe.schema import Unit
from fedtune.tasks import get_task
from fedtune.training import Metric
from tests.fusion_models import base_and_tuned, save
from tests.tiny import bert


def figures(accuracy: float, loss: float, domain: str = "all") -> list[Metric]:
    return [Metric(domain, "accuracy", accuracy), Metric(domain, "loss", loss)]


def test_the_best_input_that_scores_better_is_named() -> None:
    scores = {"one": figures(0.8, 1), "two": figures(0.9, 2), "base": figures(0.3, 3), "merged": figures(0.85, 0.1)}
    [sentence] = warn_of_better_inputs(scores, "accuracy")
    assert sentence.startswith("two scores better than the merge: accuracy 0.9000 against accuracy")


def test_a_merge_as_good_as_its_best_input_is_not_warned_of() -> None:
    assert warn_of_better_inputs({"one": figures(0.8, 1), "merged": figures(0.8, 2)}, "accuracy") == []
    assert warn_of_better_inputs({"merged": figures(0.1, 9)}, "accuracy") == []


def test_less_loss_is_better() -> None:
    lower, higher = [Metric("all", "loss", 1.0)], [Metric("all", "loss", 2.0)]
    assert len(warn_of_better_inputs({"one": lower, "merged": higher}, "loss")) == 1
    assert warn_of_better_inputs({"one": higher, "merged": lower}, "loss") == []


def test_language_models_are_ranked_by_perplexity() -> None:
    sharp, right = [Metric("all", "perplexity", 9.0)], [Metric("all", "perplexity", 10.0)]
    scores = {"one": [*sharp, *figures(0.1, 9)], "merged": [*right, *figures(0.2, 1)]}
    assert len(warn_of_better_inputs(scores, get_task("text-generation").main_metric)) == 1


def test_the_mean_over_domains_goes_before_all_examples() -> None:
    one = figures(0.9, 1, "all") + figures(0.5, 1, "mean")
    assert (
        warn_of_better_inputs({"one": one, "merged": figures(0.8, 1, "all") + figures(0.6, 1, "mean")}, "accuracy")
        == []
    )


def test_an_outlier_channel_is_told_until_the_quantile_leaves_it_out() -> None:
    level = torch.ones(200)
    level[3] = 1000
    activity = {"outlier.weight": ActivationStatistics(level), "plain.weight": ActivationStatistics(torch.ones(200))}
    [sentence] = warn_of_dominant_channels(build_pipeline([Unit(name="mean"), Unit(name="aim")]).relax, activity)
    assert sentence.startswith("aim has almost no effect on 1 of 2 weights")
    assert "median relative activity 1.0e-03 in outlier.weight" in sentence
    lower = build_pipeline([Unit(name="mean"), Unit(name="aim", settings={"quantile": 0.9})]).relax
    assert warn_of_dominant_channels(lower, activity) == []


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_evaluate_warns_on_the_screen_and_in_the_card(folder: None) -> None:
    for name, bias in (("all0", [100.0, 0, 0]), ("all1", [0.0, 10, 0])):
        model = bert()
        model.classifier.bias.data = torch.tensor(bias)
        save(model, Path(name))
    Path("texts.csv").write_text("text,label\nword3 word4,LABEL_1\nword5,LABEL_1\nword6 word7 word8,LABEL_1\n")
    arguments = ["all0", "all1", "--eval-data", "csv:texts.csv", "--task", "text-classification", "-o", "out"]
    arguments.append("--json")
    result = CliRunner().invoke(merge, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    [sentence] = warn_of_better_inputs(
        {name: [Metric(**one) for one in kept] for name, kept in document["scores"].items()}, "accuracy"
    )
    assert "all1 scores better than the merge: accuracy 1.0000 against accuracy 0.0000" in sentence
    assert document["warnings"] == [sentence]
    assert f"warning: {sentence}" in result.stderr
    assert f"## Warnings\n\n- {sentence}\n" in Path("out/README.md").read_text()


def test_aim_on_a_base_with_an_outlier_channel_warns(folder: None, tmp_path: Path) -> None:
    base_and_tuned(tmp_path)
    weights = load_file("base/model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    weights[name][5] *= 1e5
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    text = " ".join(f"word{k % 39 + 1}" for k in range(30))
    Path("texts.jsonl").write_text(f'{{"text": "{text}"}}\n' * 40)
    arguments = ["tuned1", "tuned2", "--base-model", "base", "--trust-base", "--relax", "aim", "-o", "out"]
    arguments += ["--calibration-data", "jsonl:texts.jsonl", "--task", "text-generation"]
    result = CliRunner().invoke(merge, arguments)
    assert result.exit_code == 0, result.output
    assert "warning: aim has almost no effect" in result.stderr
    assert "- aim has almost no effect" in Path("out/README.md").read_text()
