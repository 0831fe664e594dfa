"""Joined sources give the table that a reader would build by hand, and no example stands in two splits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedtune import data, tasks
from fedtune.data.splits import iter_contents
from fedtune.errors import DataError, FedtuneError, RecipeError
from fedtune.simulation import resolve_recipe
from tests.data_examples import a_recipe, csv_file, rows_of
from tests.federations import execute, trivial


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def write_csv(path: Path, rows: range, word: str = "text") -> str:
    lines = [f"{word} {row},{'no' if row % 2 else 'yes'},author {row % 20}" for row in rows]
    return csv_file(path, "text,label,author", *lines).removeprefix("data.source=")


def load(*sources: str | dict[str, Any], settings: dict[str, Any] | None = None, seed: int = 0) -> data.DataSplits:
    chosen = json.dumps({"sources": sources, **(settings or {})})
    return tasks.load_data(a_recipe(f"data={chosen}", f"seed={seed}"))


def texts(table: data.Table) -> list[str]:
    return list(table["text"])


def split_texts(found: data.DataSplits) -> dict[str, list[str]]:
    return {part: texts(getattr(found, part)) for part in ("train", "validation", "test")}


def test_joined_halves_are_the_whole_file(tmp_path: Path) -> None:
    whole = tasks.load_data(a_recipe(f"data.source={write_csv(tmp_path / 'whole.csv', range(200))}"))
    joined = load(write_csv(tmp_path / "a.csv", range(90)), write_csv(tmp_path / "b.csv", range(90, 200)))
    assert split_texts(joined) == split_texts(whole)
    assert joined.label_names == whole.label_names
    for part in ("train", "validation", "test"):
        assert list(rows_of(getattr(joined, part))) == list(rows_of(getattr(whole, part)))


def test_own_columns_filter_map_and_name_give_the_table_built_by_hand(tmp_path: Path) -> None:
    first: list[dict[str, Any]] = [
        {"review": f"review {row}", "verdict": "yes" if row % 2 else "no", "stars": row % 5} for row in range(80)
    ]
    second = [
        {"title": f"t{row}", "body": f"body {row}", "label": ["no", "yes", "maybe"][row % 3]} for row in range(60)
    ]
    found = load(
        {
            "source": write_jsonl(tmp_path / "a.jsonl", first),
            "columns": {"text": "review", "label": "verdict"},
            "filter": "stars > 1",
            "name": "shop",
        },
        {
            "source": write_jsonl(tmp_path / "b.jsonl", second),
            "map": {"text": "title + '\n' + body"},
            "filter": "label != 'maybe'",
            "name": "press",
        },
    )
    wanted = [(row["review"], row["verdict"], "shop") for row in first if row["stars"] > 1]
    wanted += [(f"{row['title']}\n{row['body']}", row["label"], "press") for row in second if row["label"] != "maybe"]
    rows = [row for part in (found.train, found.validation, found.test) for row in rows_of(part)]
    built = [(row["text"], found.label_names[row["label"]], row["domain"]) for row in rows]
    assert sorted(built) == sorted(wanted)
    order = [text for text, _, _ in wanted]
    assert all(texts(part) == [one for one in order if one in texts(part)] for part in (found.train, found.test))
    assert [(one.name, one.rows, one.removed) for one in found.sources] == [("shop", 48, 32), ("press", 40, 20)]
    for part in ("train", "validation", "test"):
        assert sum(one.parts[part] for one in found.sources) == len(getattr(found, part))


@pytest.mark.parametrize("weight", [2, 3.5, 0.5, 0.25])
def test_a_weight_counts_training_examples_and_leaves_the_other_splits(tmp_path: Path, weight: float) -> None:
    first, second = write_csv(tmp_path / "a.csv", range(150)), write_csv(tmp_path / "b.csv", range(150), "other")
    plain, found = load(first, second), load({"source": first, "weight": weight}, second)
    assert split_texts(found)["test"] == split_texts(plain)["test"]
    assert split_texts(found)["validation"] == split_texts(plain)["validation"]
    once = [text for text in texts(plain.train) if text.startswith("text")]
    counts = np.array([texts(found.train).count(text) for text in once])
    assert set(counts) == {int(weight), int(np.ceil(weight))}
    assert counts.sum() == int(weight) * len(once) + round(weight % 1 * len(once))
    rest = [text for text in texts(found.train) if text.startswith("other")]
    assert rest == [text for text in texts(plain.train) if text.startswith("other")]
    assert texts(load({"source": first, "weight": weight}, second).train) == texts(found.train)
    if weight % 1:
        assert texts(load({"source": first, "weight": weight}, second, seed=1).train) != texts(found.train)


def test_a_fraction_draws_whole_groups(tmp_path: Path) -> None:
    source: dict[str, Any] = {"source": write_csv(tmp_path / "a.csv", range(200)), "weight": 0.5}
    columns = {"columns": {"group": "author"}}
    found, plain = load(source, settings=columns), load(source["source"], settings=columns)
    sizes = {group: plain.train["group"].count(group) for group in plain.train["group"]}
    assert all(found.train["group"].count(group) == sizes[group] for group in found.train["group"])
    assert abs(len(found.train) - len(plain.train) / 2) <= max(sizes.values()) / 2


def test_copies_stay_with_one_client(tmp_path: Path) -> None:
    source = {"source": write_csv(tmp_path / "a.csv", range(200)), "weight": 3}
    recipe = a_recipe(f"data={json.dumps({'sources': [source]})}", clients=6)
    train = tasks.load_data(recipe).train
    held = [{train["text"][row] for row in rows} for rows in data.partition_examples(recipe, train)]
    assert sum(map(len, held)) == len(set().union(*held))
    assert sum(len(rows) for rows in data.partition_examples(recipe, train)) == len(train) == 3 * len(set(texts(train)))


def test_copies_and_examples_held_out_by_clients_are_refused(tmp_path: Path) -> None:
    settings = json.dumps({"sources": [{"source": "csv:a.csv", "weight": 2}]})
    recipe = a_recipe(f"data={settings}", "model.source=sample:minilm", "evaluation.local_holdout=0.2")
    with pytest.raises(RecipeError, match=r"data.sources: the weight of csv:a.csv repeats .* weights of at most 1"):
        resolve_recipe(recipe)


@pytest.mark.parametrize("seed", range(6))
def test_no_example_stands_in_two_splits(tmp_path: Path, seed: int) -> None:
    """Sources share texts; one has splits of its own, another groups, and weights repeat examples."""
    rng = np.random.default_rng(seed)
    sources: list[dict[str, Any]] = []
    for number in range(3):
        rows = [
            {"text": f"text {rng.integers(120)}", "label": int(rng.integers(2)), "who": f"w{rng.integers(30)}"}
            | ({"split": str(rng.choice(["train", "test", "dev"], p=[0.6, 0.3, 0.1]))} if number == 0 else {})
            for _ in range(150)
        ]
        source: dict[str, Any] = {"source": write_jsonl(tmp_path / f"{number}.jsonl", rows)}
        source["weight"] = float(rng.choice([0.5, 1, 2.5]))
        if number == seed % 3:
            source["columns"] = {"group": "who"}
        sources.append(source)
    found = load(*sources)
    contents = {
        part: set(iter_contents(getattr(found, part).select_columns(["text"])))
        for part in ("train", "validation", "test")
    }
    assert all(contents.values())
    assert contents["train"].isdisjoint(contents["validation"] | contents["test"])
    assert contents["validation"].isdisjoint(contents["test"])
    assert any("left out of training" in note for note in found.notes)


def test_class_numbers_of_other_orders_become_names(tmp_path: Path) -> None:
    for name, order in (("a", ["neg", "pos"]), ("b", ["pos", "neg"])):
        rows = {"text": [f"{name} {row}" for row in range(60)], "label": [row % 2 for row in range(60)]}
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=order)})
        Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / name))
    found = load(f"disk:{tmp_path / 'a'}", f"disk:{tmp_path / 'b'}")
    for part in (found.train, found.test):
        for row in rows_of(part):
            source, number = row["text"].split()
            assert found.label_names[row["label"]] == ("neg", "pos")[(int(number) + (source == "b")) % 2]


def test_columns_stay_on_the_disk_when_they_are_joined(tmp_path: Path) -> None:
    from fedtune.data.arrow import Arrow

    rows = [{"text": f"text {row}", "label": row % 2} for row in range(90)]
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", rows[at:]) for name, at in (("a", 0), ("b", 45))]
    assert isinstance(load(*sources).train.column("text"), Arrow)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (
            {"rows": [{"text": "x", "label": 1}]},
            r"column 'label' is text in csv:.* and numbers in jsonl:.*text\(label\)",
        ),
        ({"rows": [{"title": "x", "label": "yes"}]}, "has no column 'text', which data.columns.text names"),
        ({"rows": [{"text": "x", "label": "yes"}], "columns": {"domain": "label"}}, "has the column 'domain', and csv"),
        ({"rows": []}, "holds no example; bring data"),
        (
            {"rows": [{"text": "x", "label": "yes"}], "weight": 0.001},
            "weight 0.001 leaves none of .* examples; raise it",
        ),
        ({"rows": [{"text": None, "label": "yes"}]}, "row 1 has no value in column 'text'"),
        (
            {"rows": [{"text": "x", "label": "yes"}], "filter": "length(text) > 5"},
            r"data.sources.1.filter .* removes all",
        ),
        (
            {"rows": [{"text": "x", "label": "yes"}], "map": {"text": "titel"}},
            r"sources.1.map.text .* no column 'titel'",
        ),
    ],
)
def test_sources_that_do_not_fit_are_one_sentence(tmp_path: Path, second: dict[str, Any], problem: str) -> None:
    first = write_csv(tmp_path / "a.csv", range(60))
    rows = [
        {**row, "text": f"{row['text']}{at}"} if row.get("text") else row for at in range(30) for row in second["rows"]
    ]
    source = {**second, "source": write_jsonl(tmp_path / "b.jsonl", rows)}
    del source["rows"]
    with pytest.raises(FedtuneError, match=problem):
        load(first, source)


def test_a_source_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", range(60))
    with pytest.raises(DataError, match=r"there is no .*b.csv; check data.sources.1.source"):
        load(first, f"csv:{tmp_path / 'b.csv'}")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("{source: 'csv:a', sources: ['csv:b']}", "source and sources both name the data; keep one"),
        ("{sources: []}", "at least 1 item"),
        ("{sources: [{source: 'csv:a', weight: 0}]}", "data.sources.0.weight is 0, but must be greater than 0"),
        ("{sources: ['csv:a', {source: 'csv:b', name: x}]}", "csv:a has no name, as others have"),
        ("{sources: [{source: 'csv:a', name: x}, {source: 'csv:b', name: x}]}", "two are called 'x'"),
        ("{sources: [{source: 'csv:a', wieght: 2}]}", "did you mean 'weight'"),
        ("{sources: ['csv:a'], test: 'csv:b'}", "its sources bring their own splits"),
        ("{sources: [{source: 'csv:a', filter: 'a = 1'}]}", "data.sources.0.filter: 'a = 1' is no expression"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(settings: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        a_recipe(f"data={settings}")


def test_a_run_on_one_joined_source_has_the_bits_of_a_run_on_the_source(home: Path) -> None:
    plain = execute(trivial(), run="run-plain")
    joined = execute(trivial("data={sources: ['sample:digits']}"), run="run-joined")
    assert plain.hashes == joined.hashes
    assert len(set(plain.hashes)) == 3
