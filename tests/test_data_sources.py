"""Files as people have them: their delimiters, encodings, parts and folders; what is not understood is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from fedtune import data, tasks
from fedtune.data.decode import decode
from fedtune.errors import DataError, RecipeError
from tests.data_examples import a_recipe, csv_file, rows_of

ROWS = [f"text {row},{'no' if row % 2 else 'yes'}" for row in range(60)]
IMAGES = "task=image-classification"


def loaded(path: Path, *overrides: str, kind: str = "csv") -> data.DataSplits:
    return tasks.load_data(a_recipe(f"data.source={kind}:{path}", *overrides))


def everything(corpus: data.DataSplits, column: str = "text") -> list[Any]:
    return [value for part in (corpus.train, corpus.validation, corpus.test) for value in part[column]]


def text_file(path: Path, rows: list[str], heading: str = "text,label", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join([heading, *rows]) + "\n").encode(encoding))
    return path


def picture(path: Path, grey: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), grey).save(path)
    return path


def test_words_for_nothing_are_words_in_texts_and_class_names(tmp_path: Path) -> None:
    words = ["N/A", "null", "NaN", "nothing"]
    rows = [f"{words[row % 4]},{'None' if row % 2 else 'some'},{row}" for row in range(200)]
    corpus = loaded(text_file(tmp_path / "a.csv", rows, "text,label,id"), "data.columns.group=id")
    assert corpus.label_names == ("None", "some")
    assert set(everything(corpus)) == {"N/A", "null", "NaN", "nothing"}


def test_a_word_for_nothing_among_numbers_is_a_gap(tmp_path: Path) -> None:
    rows = [*[f"t{row},{row % 2}" for row in range(40)], "x,N/A"]
    with pytest.raises(DataError, match="row 41 has no value in column 'label', only a word for none among numbers"):
        loaded(text_file(tmp_path / "a.csv", rows))


def test_texts_are_kept_as_they_are_written(tmp_path: Path) -> None:
    texts = ["007", "1e5", "True", "1.50"]
    rows = [f"{texts[row % 4]},{row % 2},{row}" for row in range(80)]
    path = text_file(tmp_path / "a.csv", rows, "text,label,id")
    assert set(everything(loaded(path, "data.columns.group=id"))) == set(texts)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (("2", "10", "1"), ("1", "2", "10")),
        (("2.0", "10.0", "1"), ("1", "2", "10")),
        (("02", "10", "01"), ("01", "02", "10")),
        (("True", "False", "True"), ("False", "True")),
    ],
)
def test_numbers_are_classes_in_their_order(tmp_path: Path, values: tuple[str, ...], labels: tuple[str, ...]) -> None:
    rows = [f"t{row},{values[row % 3]}" for row in range(90)]
    assert loaded(text_file(tmp_path / "a.csv", rows)).label_names == labels


@pytest.mark.parametrize("values", [('"a,b"', "a", "b"), ('"a,b"', '"b,a"', "c"), ("a;b", "a", "b"), ("a|b", "b", "a")])
def test_labels_that_are_lists_of_classes_are_refused(tmp_path: Path, values: tuple[str, ...]) -> None:
    rows = [f"t{row},{values[row % 3]}" for row in range(90)]
    with pytest.raises(DataError, match=r"labels such as '.[,;|].' name several classes at once"):
        loaded(text_file(tmp_path / "a.csv", rows))


def test_a_class_name_may_hold_a_comma(tmp_path: Path) -> None:
    rows = [f't{row},"{["Dresses, long", "Dresses, short", "Shirts"][row % 3]}"' for row in range(90)]
    assert loaded(text_file(tmp_path / "a.csv", rows)).label_names == ("Dresses, long", "Dresses, short", "Shirts")


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_the_delimiter_is_seen_in_the_heading(tmp_path: Path, delimiter: str) -> None:
    rows = [delimiter.join([f'"one, two; three {row}"', "yn"[row % 2]]) for row in range(60)]
    corpus = loaded(text_file(tmp_path / "a.csv", rows, delimiter.join(["text", "label"])))
    assert sorted(everything(corpus)) == sorted(f"one, two; three {row}" for row in range(60))


def test_another_delimiter_can_be_named(tmp_path: Path) -> None:
    rows = [f"t{row}:{row % 2}" for row in range(60)]
    assert len(everything(loaded(text_file(tmp_path / "a.csv", rows, "text:label"), "data.delimiter=':'"))) == 60


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("first", ["", "sep=;\n", "\n"])
def test_ends_of_lines_and_a_spreadsheets_first_line_are_understood(tmp_path: Path, newline: str, first: str) -> None:
    rows = newline.join(["text;label", *[f"a, {row};{row % 2}" for row in range(60)]])
    (tmp_path / "a.csv").write_bytes((first + rows).encode())
    assert sorted(everything(loaded(tmp_path / "a.csv"))) == sorted(f"a, {row}" for row in range(60))


def test_blanks_around_a_class_name_do_not_count(tmp_path: Path) -> None:
    rows = [f"t{row},{[' yes', 'yes ', 'no'][row % 3]}" for row in range(90)]
    assert loaded(text_file(tmp_path / "a.csv", rows)).label_names == ("no", "yes")
    with pytest.raises(DataError, match="row 91 has no value in column 'label'"):
        loaded(text_file(tmp_path / "b.csv", [*rows, "x,  "]))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("three, fields,no", r"row 61 has 3 fields, the heading 2; put fields that hold the delimiter in quotes"),
        ("one", "row 61 has 1 fields, the heading 2"),
        ('"open,no', r"row 61 cannot be read as csv \(unexpected end of data\); close and double its quotes"),
    ],
)
def test_a_row_with_more_or_fewer_fields_is_refused(tmp_path: Path, row: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        loaded(text_file(tmp_path / "a.csv", [*ROWS, row]))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_encodings_are_told_from_the_bytes(tmp_path: Path, encoding: str) -> None:
    rows = [f"a long enough text, müde {row};{'süß' if row % 2 else 'herb'}" for row in range(60)]
    corpus = loaded(text_file(tmp_path / "a.csv", rows, "text;label", encoding))
    assert corpus.label_names == ("herb", "süß")
    guessed = ["is no UTF-8 and was read as cp1252" in note for note in corpus.notes]
    assert guessed == ([True] if encoding == "latin-1" else [])


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1251", "привет мир"), ("cp1250", "było w mieście"), ("shift-jis", "こんにちは世界")]
)
def test_an_encoding_that_cannot_be_told_must_be_named(tmp_path: Path, encoding: str, text: str) -> None:
    path = text_file(tmp_path / "a.csv", [f"{text} {row},{row % 2}" for row in range(60)], encoding=encoding)
    with pytest.raises(DataError, match=r"a\.csv is no text in utf-8; say which encoding it has in data\.encoding"):
        loaded(path)
    assert f"{text} 7" in everything(loaded(path, f"data.encoding={encoding}"))


def test_a_named_encoding_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.csv", ["ü,1"], encoding="latin-1")
    with pytest.raises(DataError, match="is no text in ascii"):
        loaded(path, "data.encoding=ascii")


def test_an_encoding_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.encoding: 'utf-9' is not a text encoding; write e\.g\. cp1252"):
        a_recipe("data.encoding=utf-9")


def test_a_column_called_split_says_what_is_held_out(tmp_path: Path) -> None:
    words = ["train", "train", "Test", "valid"]
    rows = [f"t{row},{row // 4 % 2},{words[row % 4]}" for row in range(80)]
    corpus = loaded(text_file(tmp_path / "a.csv", rows, "text,label,split"))
    assert set(corpus.test["text"]) == {f"t{row}" for row in range(2, 80, 4)}
    assert set(corpus.validation["text"]) == {f"t{row}" for row in range(3, 80, 4)}
    assert len(corpus.train) == 40
    device = a_recipe(f"data.source=csv:{tmp_path / 'a.csv'}")
    assert set(tasks.load_trainable_examples(device, corpus.label_names)["text"]) == set(corpus.train["text"])
    assert len(tasks.load_all_examples(device, corpus.label_names)) == 80


def test_a_split_column_may_have_another_name_or_none_count(tmp_path: Path) -> None:
    rows = [f"t{row},{row // 4 % 2},{'test' if row % 4 else 'train'}" for row in range(80)]
    named = text_file(tmp_path / "a.csv", rows, "text,label,fold")
    assert len(loaded(named, "data.columns.split=fold").test) == 60
    ignored = text_file(tmp_path / "b.csv", rows, "text,label,split")
    assert len(loaded(ignored, "data.columns.split=false").test) < 40


@pytest.mark.parametrize(
    ("words", "overrides", "sentence"),
    [
        (("train", "spare"), [], "row 2 says neither train, validation nor test in column 'split'"),
        (("train", ""), [], "row 2 says neither"),
        (("a", "b"), ["data.columns.split=split"], "row 1 says neither"),
        (("a", "b"), ["data.columns.split=parts"], "no column 'parts', which data.columns.split names"),
    ],
)
def test_a_split_column_that_is_none_is_refused(
    tmp_path: Path, words: tuple[str, str], overrides: list[str], sentence: str
) -> None:
    rows = [f"t{row},{row // 2 % 2},{words[row % 2]}" for row in range(60)]
    with pytest.raises(DataError, match=sentence):
        loaded(text_file(tmp_path / "a.csv", rows, "text,label,split"), *overrides)


def test_a_source_without_a_row_to_train_on_is_refused(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.csv", [f"t{row},{row % 2},test" for row in range(60)], "text,label,split")
    with pytest.raises(DataError, match="has rows for test only; bring some to train on"):
        loaded(path)


def test_a_column_called_split_of_something_else_is_left_alone(tmp_path: Path) -> None:
    rows = [f"t{row},{row % 2},{'banana' if row % 3 else 'cherry'}" for row in range(60)]
    assert len(everything(loaded(text_file(tmp_path / "a.csv", rows, "text,label,split")))) == 60


@pytest.mark.parametrize(
    "names", [("train.csv", "test.csv"), ("my-train_1.csv", "eval.csv"), ("train/a.csv", "test/a.csv")]
)
def test_files_are_the_parts_they_are_named_after(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, word in zip(names, ("learn", "hold"), strict=True):
        text_file(tmp_path / name, [f"{word} {row},{row % 2}" for row in range(40)])
    corpus = loaded(tmp_path)
    assert all(text.startswith("hold") for text in corpus.test["text"])
    assert len(corpus.test) == 40
    assert all(text.startswith("learn") for text in [*corpus.train["text"], *corpus.validation["text"]])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_whose_name_says_no_part_is_refused_beside_those_that_do(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"t{row}", "label": row % 2} for row in range(40)]
    for name in ("train", "test", "holdout"):
        if suffix == "csv":
            text_file(tmp_path / f"{name}.csv", [f"{row['text']},{row['label']}" for row in rows])
        else:
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=rf"the name of holdout\.{suffix} says neither train, validation nor test"):
        loaded(tmp_path, kind=suffix)
    assert len(everything(loaded(tmp_path, "data.columns.split=false", kind=suffix))) == 120


def test_files_without_parts_are_taken_together_and_must_have_the_same_columns(tmp_path: Path) -> None:
    text_file(tmp_path / "b.csv", [f"0,b{row}" for row in range(30)], "label,text")
    text_file(tmp_path / "a.csv", [f"a{row},1" for row in range(30)])
    assert len(everything(loaded(tmp_path))) == 60
    text_file(tmp_path / "c.csv", ["c,1"], "text,verdict")
    with pytest.raises(DataError, match=r"c\.csv and .*a\.csv differ in the column 'label'"):
        loaded(tmp_path)


def test_a_text_file_holds_an_example_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\r\n".join(["first", "", *[f"line {n}, with: all" for n in range(60)]]).encode())
    corpus = loaded(tmp_path / "a.txt", "task=text-generation", kind="text")
    assert sorted(everything(corpus)) == sorted(["first", *[f"line {n}, with: all" for n in range(60)]])


@pytest.mark.parametrize("parts", [True, False])
def test_a_data_set_saved_to_disk_is_read(tmp_path: Path, parts: bool) -> None:
    rows = Dataset.from_dict({"text": [f"t{row}" for row in range(60)], "label": [row % 2 for row in range(60)]})
    whole = DatasetDict(train=rows, test=rows.select(range(10))) if parts else rows
    whole.save_to_disk(str(tmp_path / "saved"))
    corpus = loaded(tmp_path / "saved", kind="disk")
    assert len(corpus.test) == 10 if parts else len(everything(corpus)) == 60
    with pytest.raises(DataError, match="is no data set that save_to_disk wrote"):
        loaded(tmp_path, kind="disk")


def test_a_rare_class_absent_from_the_test_part_is_told_and_trained(tmp_path: Path) -> None:
    corpus = loaded(text_file(tmp_path / "a.csv", [*ROWS, "rare,maybe"]))
    assert corpus.label_names == ("maybe", "no", "yes")
    assert [note.partition(": ")[2] for note in corpus.notes] == [
        "the test split has no example of class 'maybe'; its score tells nothing of it"
    ]


def test_a_csv_may_list_pictures_as_seen_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"shots/{row}.png,{'ab'[row % 2]}" for row in range(40)]
    for row in range(40):
        picture(tmp_path / "table" / "shots" / f"{row}.png", row)
    monkeypatch.chdir(tmp_path)
    table = text_file(Path("table") / "list.csv", rows, "image,label")
    corpus = loaded(table, IMAGES)
    assert sorted(int(decode(image, "")[0, 0, 0]) for image in everything(corpus, "image")) == list(range(40))
    (tmp_path / "table" / "shots" / "9.png").unlink()
    with pytest.raises(DataError, match=r"there is no image .*/table/shots/9\.png; check data\.columns\.image"):
        loaded(table, IMAGES)


def classes(folder: Path) -> dict[str, str]:
    corpus = loaded(folder, IMAGES, kind="folder")
    found = {}
    for part in (corpus.train, corpus.validation, corpus.test):
        for row in rows_of(part):
            found[str(decode(row["image"], "")[0, 0, 0])] = corpus.label_names[row["label"]]
    return found


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["animals/cat", "animals/dog"], ["cat", "dog"]),
        (["cat/indoor", "cat/outdoor", "dog/indoor"], ["cat", "cat", "dog"]),
        (["cat", "dog/indoor"], ["cat", "dog"]),
        (["cat/a/b", "dog"], ["cat", "dog"]),
        ([".cache/x", "cat", "dog"], [None, "cat", "dog"]),
    ],
)
def test_classes_are_the_folders_of_pictures_also_nested(
    tmp_path: Path, folders: list[str], expected: list[str | None]
) -> None:
    for number, folder in enumerate(folders):
        for index in range(30):
            picture(tmp_path / folder / f"{index}.png", number * 30 + index)
    found = classes(tmp_path)
    kept = {number: name for number, name in enumerate(expected) if name is not None}
    assert found == {str(number * 30 + i): name for number, name in kept.items() for i in range(30)}


def test_folders_of_parts_hold_folders_of_classes(tmp_path: Path) -> None:
    for part, grey in {"train": 1, "val": 2, "test": 3}.items():
        for name in ("cat", "dog"):
            for index in range(4):
                picture(tmp_path / part / name / f"test_{index}.png", grey)
    corpus = loaded(tmp_path, IMAGES, kind="folder")
    assert corpus.label_names == ("cat", "dog")
    for table, grey in ((corpus.train, 1), (corpus.validation, 2), (corpus.test, 3)):
        assert [int(decode(image, "")[0, 0, 0]) for image in table["image"]] == [grey] * 8


def test_a_class_called_train_is_not_taken_for_a_part_by_itself(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        for index in range(30):
            picture(tmp_path / name / f"{index}.png", index)
    with pytest.raises(DataError, match=r"the name of bus/0\.png says neither train"):
        loaded(tmp_path, IMAGES, kind="folder")
    assert loaded(tmp_path, IMAGES, "data.columns.split=false", kind="folder").label_names == ("bus", "train")


def test_pictures_outside_class_folders_are_refused(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "2.png"):
        picture(tmp_path / name)
    with pytest.raises(DataError, match=r"2\.png is not in the folder of a class"):
        loaded(tmp_path, IMAGES, kind="folder")
    with pytest.raises(DataError, match="is no folder; name the folder"):
        loaded(tmp_path / "2.png", IMAGES, kind="folder")


def test_unreadable_pictures_are_left_out_when_that_is_asked_for(tmp_path: Path) -> None:
    for index in range(60):
        picture(tmp_path / "ab"[index % 2] / f"{index}.png", index)
    (tmp_path / "a" / "0.png").write_bytes(b"oops")
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "1.png").read_bytes()[:40])
    corpus = loaded(tmp_path, IMAGES, "data.skip_unreadable=true", kind="folder")
    assert sorted(int(decode(image, "")[0, 0, 0]) for image in everything(corpus, "image")) == list(range(2, 60))
    assert "2 images cannot be read and are left out, among them" in corpus.notes[0]


def test_a_part_that_is_empty_is_refused_wherever_it_is_asked_for(tmp_path: Path) -> None:
    recipe = a_recipe(csv_file(tmp_path / "a.csv", "text,label,group", *[f"t{r},{r % 2},x" for r in range(9)]))
    recipe = a_recipe(f"data.source={recipe.data.source}", "data.columns.group=group")
    with pytest.raises(DataError, match=r"the validation split is empty; change data\.splits or bring more data"):
        tasks.load_all_examples(recipe, ("0", "1"), "validation")
