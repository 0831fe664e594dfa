"""Each split may come from a source of its own; what is not named is drawn from train, as from any source."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune import data, tasks
from fedtune.device.local_data import LocalData
from fedtune.errors import DataError, FedtuneError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.training import clear_run_context, get_run_context
from fedtune.wire.client_update import TrainRequest
from tests.data_examples import a_recipe, csv_file, rows_of
from tests.federations import words


def write(path: Path, rows: range, heading: str = "text,label,author", labels: tuple[str, ...] = ("no", "yes")) -> str:
    lines = [f"text {row},{labels[row % len(labels)]},author {row % 20}" for row in rows]
    return csv_file(path, heading, *lines).removeprefix("data.source=")


def load(**settings: Any) -> data.DataSplits:
    return tasks.load_data(a_recipe(f"data={json.dumps(settings)}"))


def test_all_three_are_what_the_files_hold(tmp_path: Path) -> None:
    spans = {"train": range(60), "validation": range(60, 80), "test": range(80, 120)}
    found = load(**{part: write(tmp_path / f"{part}.csv", rows) for part, rows in spans.items()})
    for part, rows in spans.items():
        assert list(getattr(found, part)["text"]) == [f"text {row}" for row in rows]
        assert list(getattr(found, part)["label"]) == [row % 2 for row in rows]
    assert [one.rows for one in found.sources] == [60, 20, 40]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_what_is_not_named_is_drawn_as_from_a_folder_without_it(tmp_path: Path, part: str) -> None:
    (tmp_path / "folder").mkdir()
    train = write(tmp_path / "folder" / "train.csv", range(150))
    other = write(tmp_path / "folder" / f"{part}.csv", range(150, 180))
    found, wanted = load(train=train, **{part: other}), load(source=f"csv:{tmp_path / 'folder'}")
    for each in ("train", "validation", "test"):
        assert list(rows_of(getattr(found, each))) == list(rows_of(getattr(wanted, each)))


def test_a_source_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    rows = [f"text {row},{row % 2},{['train', 'train', 'test', 'dev'][row % 4]}" for row in range(80)]
    whole = csv_file(tmp_path / "all.csv", "text,label,split", *rows).removeprefix("data.source=")
    found = load(train=whole, test=write(tmp_path / "own.csv", range(30), labels=("0", "1")))
    assert list(found.train["text"]) == [f"text {row}" for row in range(80) if row % 4 < 2]
    assert list(found.validation["text"]) == [f"text {row}" for row in range(80) if row % 4 == 3]
    assert list(found.test["text"]) == [f"text {row}" for row in range(30)]
    only = load(train=write(tmp_path / "train.csv", range(40), labels=("0", "1")), test=whole)
    assert list(only.test["text"]) == [f"text {row}" for row in range(80) if row % 4 == 2]


def test_columns_filter_and_map_hold_for_all_three(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", range(80)), write(tmp_path / "b.csv", range(80, 120))
    found = load(train=train, test=test, filter="author != 'author 3'", map={"text": "author + ': ' + text"})
    assert list(found.test["text"]) == [f"author {row % 20}: text {row}" for row in range(80, 120) if row % 20 != 3]
    assert [one.removed for one in found.sources] == [4, 2]


def test_a_class_that_training_lacks_is_said(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", range(60))
    found = load(train=train, test=write(tmp_path / "b.csv", range(30), labels=("no", "yes", "maybe")))
    assert found.label_names == ("maybe", "no", "yes")
    assert any("train split has no example of class 'maybe'; nothing is learned of it" in note for note in found.notes)


def test_class_numbers_of_another_order_become_names(tmp_path: Path) -> None:
    for name, order in (("train", ["neg", "pos"]), ("test", ["pos", "neg"])):
        rows = {"text": [f"{name} {row}" for row in range(60)], "label": [row % 2 for row in range(60)]}
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=order)})
        Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / name))
    found = load(train=f"disk:{tmp_path / 'train'}", test=f"disk:{tmp_path / 'test'}")
    assert [found.label_names[number] for number in found.test["label"]] == ["pos", "neg"] * 30
    for text, number in zip(found.train["text"], found.train["label"], strict=True):
        assert found.label_names[number] == ("neg", "pos")[int(text.split()[1]) % 2]


def test_labels_of_two_types_are_one_sentence(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", range(60)), write(tmp_path / "b.csv", range(9), labels=("0", "1"))
    with pytest.raises(DataError, match=r"column 'label' is text in csv:.*a.csv and numbers in csv:.*text\(label\)"):
        load(train=train, test=test)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"train": "{a}", "test": "{odd}"}, "odd.csv has no column 'text', which data.columns.text names"),
        ({"train": "{a}", "test": "csv:none.csv"}, "there is no none.csv; check data.test"),
        ({"train": "{a}", "test": "scv:none.csv"}, "data.test is 'scv:none.csv'; write hub:ID"),
        ({"train": "{a}", "test": "{a}", "filter": "label == 'maybe'"}, r"a.csv: data.filter .* removes all 60 rows"),
    ],
)
def test_sources_that_do_not_fit_are_one_sentence(tmp_path: Path, settings: dict[str, str], problem: str) -> None:
    names = {
        "a": write(tmp_path / "a.csv", range(60)),
        "odd": write(tmp_path / "odd.csv", range(9), "txt,label,author"),
    }
    with pytest.raises(FedtuneError, match=problem):
        load(**{key: value.format(**names) for key, value in settings.items()})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("{source: 'csv:a', train: 'csv:b'}", "data: source and train both name the data; keep one of them"),
        ("{source: 'csv:a', test: 'csv:b'}", "data: test stands beside train only; write train instead of source"),
        ("{test: 'csv:b'}", "data: test stands beside train only; add train"),
        ("{columns: {text: a}}", "the key 'source' is missing; name a source, train"),
        (
            "{source: 'csv:a', columns: {text: b}, map: {text: c}}",
            "map makes a column 'text', but columns.text names 'b'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(settings: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        a_recipe(f"data={settings}")


def test_a_recipe_without_the_new_keys_is_written_as_before() -> None:
    written = json.loads(a_recipe().model_dump_json())["data"]
    assert list(written) == [
        *("source", "columns", "splits", "partition", "max_train_examples", "delimiter", "tokens", "encoding"),
        "skip_unreadable",
    ]
    for settings in ("{train: a, test: b}", "{sources: [a, {source: b, weight: 0.5, map: {text: c}}], filter: d > 1}"):
        recipe = a_recipe(f"data={settings}")
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def make_federation(folder: Path) -> Recipe:
    """A tiny BERT on three files of words, one per split."""
    recipe = words(folder)
    rows = (folder / "words.csv").read_text(encoding="utf-8").splitlines()
    cuts = {"train": slice(1, len(rows) // 2), "validation": slice(len(rows) // 2, -9), "test": slice(-9, None)}
    settings: dict[str, Any] = {"map": {"text": "text + ' red'"}, "filter": "length(text) > 3"}
    for part, span in cuts.items():
        (folder / f"{part}.csv").write_text("\n".join([rows[0], *rows[span]]) + "\n", encoding="utf-8")
        settings[part] = f"csv:{folder / part}.csv"
    columns = recipe.data.columns
    return recipe.model_copy(update={"data": type(recipe.data)(**settings, columns=columns)})


def ask(recipe: Recipe, source: str, labels: tuple[str, ...]) -> tuple[data.Table, list[int]]:
    """What a device reads whose ``--data`` is ``source``."""
    clear_run_context()
    request = TrainRequest(recipe.model_dump_json(), 1, 0, "run", json.dumps(labels))
    context, rows = LocalData(source).get_context(request)
    clear_run_context()
    return context.corpus.train, rows.tolist()


@pytest.mark.parametrize("limit", [None, 20])
def test_a_device_needs_no_held_out_file_for_its_partition(tmp_path: Path, limit: int | None) -> None:
    recipe = make_federation(tmp_path)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_train_examples": limit})})
    clear_run_context()
    context = get_run_context(recipe.model_dump_json())
    (tmp_path / "validation.csv").unlink()
    (tmp_path / "test.csv").unlink()
    train, rows = ask(recipe, "partition:1", context.corpus.label_names)
    assert list(rows_of(train)) == list(rows_of(context.corpus.train))
    assert rows == context.client_rows[1].tolist()
    assert rows


def test_a_device_reads_its_own_source_with_the_columns_filter_and_map_of_the_recipe(tmp_path: Path) -> None:
    recipe = make_federation(tmp_path)
    labels = tasks.load_data(recipe).label_names
    for part in ("validation", "test"):
        (tmp_path / f"{part}.csv").unlink()
    own = csv_file(tmp_path / "own.csv", "text,label", f"cat,{labels[0]}", f"dog,{labels[1]}", f"?,{labels[0]}")
    train, rows = ask(recipe, own.removeprefix("data.source="), labels)
    assert list(train["text"]) == ["cat red", "dog red", "? red"]
    assert rows == [0, 1, 2]
    missing = csv_file(tmp_path / "odd.csv", "words,label", f"cat,{labels[0]}").removeprefix("data.source=")
    with pytest.raises(DataError, match=r"data.map.text .* there is no column 'text'") as caught:
        ask(recipe, missing, labels)
    assert caught.value.code == "data-columns"
