"""``data.filter`` and ``data.map`` on sources: rows as pandas selects them, in memory and on the disk."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from datasets import ClassLabel, Dataset, Features, Value

from fedtune import tasks
from fedtune.cli.data import data as command
from fedtune.data import Table
from fedtune.data.arrow import Arrow
from fedtune.data.token_files import StoredTexts
from fedtune.errors import FedtuneError
from fedtune.training import RunContext, clear_run_context, get_run_context
from tests.data_examples import TEXT, a_recipe, csv_file
from tests.test_token_files import recipe, write_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))


def context(**settings: Any) -> RunContext:
    folder = settings.pop("folder")
    clear_run_context()
    found = get_run_context(
        recipe(folder, *(f"data.{key}={json.dumps(one)}" for key, one in settings.items())).model_dump_json()
    )
    clear_run_context()
    return found


def tokens(found: RunContext) -> dict[str, list[list[int]]]:
    kept = {part: getattr(found, part) for part in ("train", "validation", "test")}
    return {
        part: [examples.make_batch([row])["input_ids"][0].tolist() for row in range(len(examples))]
        for part, examples in kept.items()
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_table_is_filtered_and_mapped_as_pandas_does(tmp_path: Path, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 900
    table = pd.DataFrame(
        {
            "title": [f"title {row} " + "x" * int(rng.integers(12)) for row in range(count)],
            "body": [None if rng.random() < 0.2 else f"body {row}" for row in range(count)],
            "label": rng.choice(["good", "bad", "neutral"], count),
            "stars": rng.integers(0, 6, count),
        }
    )
    path = tmp_path / f"a.{kind}"
    writers: dict[str, Any] = {
        "csv": lambda: table.to_csv(path, index=False),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }
    writers[kind]()
    stars = "number(stars)" if kind == "csv" else "stars"
    made = {"text": "title + '\n' + coalesce(body, 'none')", "tall": f"{stars} > 3"}
    settings = {
        "source": f"{kind}:{path}",
        "map": made,
        "filter": f"label != 'neutral' and length(text) > 20 or {stars} in (0, 5) and not tall",
        "columns": {"group": "title"},
    }
    found = tasks.load_data(a_recipe(f"data={json.dumps(settings)}"))
    texts = table.title + "\n" + table.body.fillna("none")
    kept = ((table.label != "neutral") & (texts.str.len() > 20)) | ((table.stars == 0) & ~(table.stars > 3))
    rows = [*found.train["text"], *found.validation["text"], *found.test["text"]]
    assert sorted(rows) == sorted(texts[kept])
    assert found.sources[0].rows == kept.sum()
    assert found.sources[0].removed == count - kept.sum()
    labels = dict(zip(texts, table.label, strict=True))
    given = zip(found.train["text"], found.train["label"], strict=True)
    assert all(found.label_names[number] == labels[text] for text, number in given)


def test_a_null_is_no_match_and_a_bare_name_keeps_its_classes(tmp_path: Path) -> None:
    rows = {"review": [f"r{row}" for row in range(60)], "verdict": [row % 3 if row else -1 for row in range(60)]}
    kinds = Features({"review": Value("string"), "verdict": ClassLabel(names=["z", "y", "x"])})
    Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / "a"))
    settings = {
        "source": f"disk:{tmp_path / 'a'}",
        "map": {"text": "review", "label": "verdict"},
        "filter": "verdict is not None and verdict != 'y'",
    }
    found = tasks.load_data(a_recipe(f"data={json.dumps(settings)}"))
    assert found.label_names == ("z", "y", "x")
    wanted = {f"r{row}": "zyx"[row % 3] for row in range(1, 60) if row % 3 != 1}
    for part in (found.train, found.validation, found.test):
        for text, number in zip(part["text"], part["label"], strict=True):
            assert found.label_names[number] == wanted.pop(text)
    assert not wanted


def test_a_made_column_may_name_the_split_of_each_row(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "a.csv", "text,label,year", *(f"t{row},{row % 2},{2000 + row}" for row in range(60)))
    made = {"split": "'test' if number(year) >= 2040 else 'dev' if number(year) >= 2030 else 'train'"}
    found = tasks.load_data(a_recipe(source, f"data.map={json.dumps(made)}"))
    assert list(found.test["text"]) == [f"t{row}" for row in range(40, 60)]
    assert list(found.validation["text"]) == [f"t{row}" for row in range(30, 40)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"filter": "lenght > 3"}, r"a.csv: data.filter 'lenght > 3': there is no column 'lenght'; allowed: label, n"),
        ({"filter": "length(text) > 99"}, r"data.filter .*: it removes all 60 rows; loosen it"),
        ({"filter": "n > 3"}, r"data.filter 'n > 3': n is text, and 3 is a number; write number\(n\)"),
        ({"filter": "length(text)"}, "it is a number, not true or false; compare it with a value"),
        ({"filter": "1 < 2"}, "it names no column, so it keeps all rows or none"),
        ({"filter": "number(text) > 1"}, "it cannot be computed .Failed to parse string: 't.*fill or fix the values"),
        ({"filter": "matches(text, '(')"}, "it cannot be computed .Invalid regular expression"),
        ({"map": {"text": "n + 1"}}, r"data.map.text 'n \+ 1': 1 is a number, and \+ takes text; write text\(1\)"),
        ({"map": {"label": "column('my label')"}}, "data.map.label .*: there is no column 'my label'"),
    ],
)
def test_expressions_that_do_not_fit_are_one_sentence(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    source = csv_file(tmp_path / "a.csv", "text,label,n", *(f"t{row},{row % 2},{row}" for row in range(60)))
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in settings.items()]
    with pytest.raises(FedtuneError, match=problem) as caught:
        tasks.load_data(a_recipe(source, *overrides))
    assert "\n" not in str(caught.value)


def test_tokens_on_the_disk_are_those_in_memory(home: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "folder": tmp_path,
        "filter": "length(text) != 12",
        "map": {"text": "text + ' ' + upper('red')"},
    }
    held, stored = (context(**settings, tokens=kind) for kind in ("memory", "disk"))
    assert isinstance(stored.train, StoredTexts)
    assert tokens(stored) == tokens(held)
    assert len(list((tmp_path / "cache" / "columns").iterdir())) == 1


def test_joined_tokens_on_the_disk_are_those_in_memory(home: Path, tmp_path: Path) -> None:
    recipe(tmp_path)
    write_texts(tmp_path, 70)
    (tmp_path / "data.jsonl").rename(tmp_path / "more.jsonl")
    write_texts(tmp_path, 90)
    sources: list[dict[str, Any]] = [
        {"source": f"jsonl:{tmp_path / 'data.jsonl'}", "weight": 1.5},
        {"source": f"jsonl:{tmp_path / 'more.jsonl'}", "map": {"text": "'dog ' + text"}, "filter": "length(text) > 20"},
    ]
    held, stored = (context(folder=tmp_path, source=None, sources=sources, tokens=kind) for kind in ("memory", "disk"))
    assert isinstance(stored.train, StoredTexts)
    assert isinstance(stored.corpus.train.column("text"), Arrow)
    assert tokens(stored) == tokens(held)
    folders = {getattr(stored, part).folder for part in ("train", "validation", "test")}
    assert len(folders) == 3

    def train_folder(changed: list[dict[str, Any]]) -> Path:
        found = context(folder=tmp_path, source=None, sources=changed, tokens="disk").train
        assert isinstance(found, StoredTexts)
        return found.folder

    first = stored.train.folder
    assert train_folder(sources) == first
    assert train_folder([{**sources[0], "weight": 2}, sources[1]]) != first
    assert train_folder([sources[0], {**sources[1], "map": {"text": "'cat ' + text"}}]) != first
    assert train_folder([sources[0], {**sources[1], "filter": "length(text) > 24"}]) != first
    more = tmp_path / "more.jsonl"
    more.write_text(more.read_text().replace("n3", "n4"), encoding="utf-8")
    os.utime(more, (1, 1))
    changed = context(folder=tmp_path, source=None, sources=sources, tokens="disk")
    assert isinstance(changed.train, StoredTexts)
    assert changed.train.folder != first
    assert tokens(changed) == tokens(context(folder=tmp_path, source=None, sources=sources))


def test_splits_named_by_a_column_have_tokens_of_their_own_on_the_disk(home: Path, tmp_path: Path) -> None:
    recipe(tmp_path)
    rows = [{"text": f"red cat n{row}", "split": ["train", "dev", "test"][row % 3]} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held, stored = (context(folder=tmp_path, tokens=kind) for kind in ("memory", "disk"))
    assert tokens(stored) == tokens(held)
    parts: list[Table] = [stored.corpus.train, stored.corpus.validation, stored.corpus.test]
    assert len({part.origin for part in parts}) == 3


def test_show_counts_rows_per_source_and_what_the_filter_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    source = csv_file(tmp_path / "a.csv", "text,label", *(f"text {row},{row % 2}" for row in range(200)))
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT.replace("sample:sentiment", source.removeprefix("data.source=")), encoding="utf-8")
    arguments = ["show", str(path), "--examples", "0", "--set", "data.filter=not ends_with(text, '7')"]
    shown = json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).output)
    assert shown["sources"] == [
        {
            "source": source.removeprefix("data.source="),
            "name": "",
            "rows": 180,
            "removed": 20,
            "weight": 1,
            "parts": {},
        }
    ]
    assert sum(shown["parts"].values()) == 180
    printed = CliRunner().invoke(command, arguments, catch_exceptions=False).output
    assert "removed by filter" in printed
    assert any(line.split()[-2:] == ["180", "20"] for line in printed.splitlines())
