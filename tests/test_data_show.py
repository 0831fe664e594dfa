import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fedtune import data
from fedtune.cli.data import data as command
from fedtune.data.partition_plot import draw_partition
from tests.data_examples import TEXT, a_recipe, labelled
from tests.task_cases import save_encoder


def a_summary(clients: int, *overrides: str) -> data.PartitionSummary:
    recipe = a_recipe(*overrides, clients=clients)
    train = labelled(12 * clients, classes=3, group_size=2)
    corpus = data.DataSplits(train, train.select(range(4)), train.select(range(5)), ("no", "maybe", "yes"))
    return data.summarise_partition(recipe, corpus, data.partition_examples(recipe, train))


def test_a_summary_counts_examples_groups_and_labels() -> None:
    devices = "devices=[{name: phone, count: 1}, {name: watch, count: 2}]"
    recipe = a_recipe(devices)
    train = labelled(12, classes=3, group_size=2)
    corpus = data.DataSplits(train, train.select(range(4)), train.select(range(5)), ("no", "maybe", "yes"))
    summary = data.summarise_partition(recipe, corpus, [np.arange(6), np.arange(6, 10), np.arange(10, 12)])
    assert summary.parts == {"train": 12, "validation": 4, "test": 5}
    assert (summary.by, summary.values) == ("label", ("no", "maybe", "yes"))
    assert summary.holdings == (
        data.ClientExamples(client=0, device="phone", examples=6, groups=3, counts=(2, 2, 2)),
        data.ClientExamples(client=1, device="watch", examples=4, groups=2, counts=(2, 2, 0)),
        data.ClientExamples(client=2, device="watch", examples=2, groups=1, counts=(0, 0, 2)),
    )


def test_a_natural_split_is_counted_by_domain() -> None:
    summary = a_summary(3, "data.partition={kind: natural, by: domain}", "data.columns.domain=domain")
    assert (summary.by, summary.values) == ("domain", ("a", "b", "c"))
    assert [sorted(holding.counts) for holding in summary.holdings] == [[0, 0, 12]] * 3


@pytest.mark.parametrize("clients", [1, 8, 1000])
def test_a_picture_is_written_for_few_and_many_clients(tmp_path: Path, clients: int) -> None:
    draw_partition(a_summary(clients), tmp_path / "pictures" / "split.png")
    with Image.open(tmp_path / "pictures" / "split.png") as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > drawn.height
        assert len(drawn.convert("RGB").getcolors(maxcolors=10**6) or []) > 10
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["split.png"]


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    rows = "".join(f"text {row},{'yes' if row % 2 else 'no'}\n" for row in range(400))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "recipe.yaml").write_text(TEXT.replace("sample:sentiment", f"csv:{tmp_path / 'a.csv'}"))
    return tmp_path / "recipe.yaml"


def test_show_prints_a_row_per_client_and_the_picture(recipe_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["show", str(recipe_file)], catch_exceptions=False)
    picture = tmp_path / "home" / "pictures" / "example-split.png"
    assert result.exit_code == 0
    assert picture.is_file()
    assert f"plot: {picture}" in result.output
    assert sum("phone" in line for line in result.output.splitlines()) == 4


def test_show_cuts_a_long_table_and_says_so(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["--set", "devices=[{name: phone, count: 100}]", "--output", str(tmp_path / "here.png")]
    result = CliRunner().invoke(command, ["show", str(recipe_file), *overrides], catch_exceptions=False)
    assert sum("phone" in line for line in result.output.splitlines()) == 40
    assert "and 60 more clients" in result.output
    assert (tmp_path / "here.png").is_file()


def test_show_gives_json_that_adds_up(recipe_file: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    model = ["--set", f"model.source=path:{tmp_path / 'model'}"]
    result = CliRunner().invoke(command, ["show", str(recipe_file), *model, "--json"], catch_exceptions=False)
    shown = json.loads(result.stdout)
    assert shown.keys() == {"name", "parts", "by", "values", "holdings", "plot", "examples"}
    assert [[part["target"] for part in one] for one in shown["examples"]] == [[False, True]] * 3
    assert sum(holding["examples"] for holding in shown["holdings"]) == shown["parts"]["train"]
    assert all(sum(holding["counts"]) == holding["examples"] for holding in shown["holdings"])
    assert sum(shown["parts"].values()) == 400


def test_show_prints_three_examples_unless_told_otherwise(recipe_file: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    model = ["--set", f"model.source=path:{tmp_path / 'model'}"]
    printed = [
        CliRunner().invoke(command, ["show", str(recipe_file), *own], catch_exceptions=False)
        for own in (model, [*model, "--examples", "0"], [])
    ]
    assert [one.exit_code for one in printed] == [0, 0, 0]
    assert [one.output.count("[[") for one in printed] == [3, 0, 0]
    assert ["warning: no examples are shown: " in one.stderr for one in printed] == [False, False, True]


def test_many_labels_are_named_and_not_squeezed_into_columns(recipe_file: Path, tmp_path: Path) -> None:
    rows = "".join(f"text {row},kind{row % 12}\n" for row in range(400))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
    result = CliRunner().invoke(command, ["show", str(recipe_file)], catch_exceptions=False)
    lines = [line for line in result.output.splitlines() if "phone" in line]
    assert len(lines) == 4
    assert all("kind" in line and ", and 9 more" in line for line in lines)
