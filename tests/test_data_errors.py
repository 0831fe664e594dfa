from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune import tasks
from fedtune.errors import DataError, SourceError
from tests.data_examples import ROWS, a_recipe, csv_file


@pytest.mark.parametrize(
    ("rows", "overrides", "sentence"),
    [
        (ROWS, ["data.columns.text=txt"], "has no column 'txt', which data.columns.text names; did you mean 'text'"),
        (ROWS, ["data.columns.group=autor"], "which data.columns.group names; did you mean 'author'"),
        (ROWS, ["data.partition={kind: natural, by: writer}"], "no column 'writer', which data.partition.column names"),
        ([], [], "holds no example; bring data"),
        (["a,yes,x", "b,,x"], [], "row 2 has no value in column 'label'; fill it or drop the row"),
        ([",yes,x", "b,no,x"], [], "row 1 has no value in column 'text'"),
        ([f"t{row},yes,x" for row in range(9)], [], "has only the class 'yes'; classification needs two"),
        (
            [f"t{row},{row / 7},x" for row in range(99)],
            [],
            "99 different real numbers as labels; cut them into classes",
        ),
        (
            [f"t{row},{row % 2},x" for row in range(9)],
            ["data.columns.group=author"],
            "split is empty; change data.splits",
        ),
        (
            [f"t{row},{row % 2},{'all' if row % 3 else 'x'}" for row in range(99)],
            ["data.columns.domain=author"],
            "a domain is called 'all', as summaries are; rename it",
        ),
        (
            ROWS,
            ["data.columns.group=author", "data.max_train_examples=9"],
            "data.max_train_examples is 9, but a group of .* has 10 examples",
        ),
    ],
)
def test_data_that_does_not_fit_is_one_sentence(
    tmp_path: Path, rows: list[str], overrides: list[str], sentence: str
) -> None:
    source = csv_file(tmp_path / "a.csv", "text,label,author", *rows)
    with pytest.raises(DataError, match=sentence):
        tasks.load_data(a_recipe(source, *overrides))


@pytest.mark.parametrize(
    ("source", "content", "sentence"),
    [
        ("csv:{}", None, "there is no"),
        ("csv:{}", "", "holds no example"),
        ("jsonl:{}", "{oops", "cannot be read as json"),
        ("parquet:{}", "oops", "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_silent_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match=sentence):
        tasks.load_data(a_recipe("data.source=" + source.format(tmp_path / "file")))
    assert capfd.readouterr() == ("", "")


def test_labels_of_another_part_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    for part, label in {"train": 1, "test": -1}.items():
        rows = {"text": ["a", "b"], "label": [label, label]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}.parquet")
    with pytest.raises(
        DataError, match=r"test split: the label -1 is none of the 2 classes; are these examples labelled"
    ):
        tasks.load_data(a_recipe(f"data.source=parquet:{tmp_path}"))


def test_a_column_without_pictures_is_refused(tmp_path: Path) -> None:
    table = csv_file(tmp_path / "table.csv", "text,label,author", *ROWS)
    with pytest.raises(DataError, match=r"there is no image .*author 0; check data\.columns\.image"):
        tasks.load_data(a_recipe(table, "task=image-classification", "data.columns.image=author"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("sample:sentimnt", "did you mean 'sentiment'"),
        ("reviews.csv", "write hub:ID, csv:FILE"),
    ],
)
def test_a_source_that_is_none_is_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence):
        tasks.load_data(a_recipe(f"data.source={source}"))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_of_small_data_that_is_empty_is_refused_also_for_scoring(tmp_path: Path, part: str) -> None:
    rows = ("one,no", "two,yes")
    source = csv_file(tmp_path / "a.csv", "text,label", *rows)
    recipe = a_recipe(source, "data.splits={validation: 0.001, test: 0.001}")
    with pytest.raises(DataError, match=rf"the {part} split is empty; change data.splits or bring more data"):
        tasks.load_all_examples(recipe, ("no", "yes"), part)
    assert len(tasks.load_all_examples(recipe, ("no", "yes"))) == 2


@pytest.mark.parametrize("part", ["all", "test"])
@pytest.mark.parametrize(
    ("name", "said"),
    [("all", "a domain is called 'all', as summaries are"), ("d" * 256, "has 256 characters, and 255 are kept")],
)
def test_a_domain_that_scores_cannot_tell_is_refused_also_for_scoring(
    tmp_path: Path, part: str, name: str, said: str
) -> None:
    rows = [f"text {row},{'no' if row % 2 else 'yes'},{name}" for row in range(60)]
    recipe = a_recipe(csv_file(tmp_path / "a.csv", "text,label,kind", *rows), "data.columns={domain: kind}")
    with pytest.raises(DataError, match=said):
        tasks.load_all_examples(recipe, ("no", "yes"), part)
