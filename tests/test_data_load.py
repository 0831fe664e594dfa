import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from fedtune import data, sample_packages, tasks
from fedtune.data import image_samples, sentiment_samples
from fedtune.data.decode import decode
from fedtune.errors import ChecksumError, SourceError
from tests.data_examples import ROWS, a_recipe, csv_file, rows_of


@pytest.fixture
def table(tmp_path: Path) -> str:
    return csv_file(tmp_path / "table.csv", "text,label,author", *ROWS)


def texts(dataset: data.Table) -> set[str]:
    return set(dataset["text"])


def test_the_four_domains_hold_the_published_counts() -> None:
    loaded = sentiment_samples.sentiment()["train"]
    counts = Counter(zip(loaded["domain"], loaded["label"], strict=True))
    published = {
        "tweets": (2596, 1174),
        "movies": (5135, 5225),
        "products": (1865, 1311),
        "editorials": (1538, 2171),
    }
    assert counts == {
        (domain, label): count
        for domain, pair in published.items()
        for label, count in zip(("positive", "negative"), pair, strict=True)
    }
    assert min(map(abs, loaded["rating"])) > 0.25


def test_reviews_and_articles_are_groups() -> None:
    raw = sentiment_samples._read()
    groups = Counter(group.split("/")[0] for group in {row["group"] for row in raw})
    assert len(raw) == 4200 + 10605 + 3708 + 5190
    assert (groups["products"], groups["editorials"]) == (300, 498)


def test_a_sample_may_be_taken_by_domain() -> None:
    named = "data.columns={domain: domain}"
    whole = tasks.load_data(a_recipe("data.source=sample:sentiment", named))
    movies = tasks.load_data(a_recipe("data.source=sample:sentiment:movies", named))
    for part in ("train", "validation", "test"):
        rows, kept = getattr(whole, part), getattr(movies, part)
        wanted = [text for text, domain in zip(rows["text"], rows["domain"], strict=True) if domain == "movies"]
        assert kept["text"][:] == wanted


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sample:sentiment:movie", "^sample:sentiment has no domain 'movie'; .*movies"),
        ("sample:films:movies", "^sample:films has no domain 'movies'; leave it out$"),
    ],
)
def test_a_domain_that_a_sample_has_not_is_refused(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        tasks.load_data(a_recipe(f"data.source={source}"))


def test_films_are_all_the_film_sentences() -> None:
    loaded = sentiment_samples.films()["train"]
    assert (len(loaded), loaded.column_names) == (10605, ["text", "group"])


def test_no_review_of_the_sample_is_in_two_parts_though_the_recipe_names_no_group() -> None:
    corpus = tasks.load_data(a_recipe())
    train, validation, test = (set(part["group"]) for part in (corpus.train, corpus.validation, corpus.test))
    assert len(train | validation | test) == len(train) + len(validation) + len(test)
    assert corpus.label_names == ("negative", "positive")
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 21015


@pytest.mark.parametrize(
    ("read", "count", "side"), [(image_samples.mnist_5k, 5000, 28), (image_samples.digits, 1797, 8)]
)
def test_sample_images_fill_the_whole_range_of_grey(
    read: Callable[[], dict[str, data.Table]], count: int, side: int
) -> None:
    loaded = read()["train"]
    pixels = loaded.greys()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (count, side, side)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert set(loaded["label"]) == set(range(10))


def test_mnist_5k_is_balanced() -> None:
    assert set(Counter(image_samples.mnist_5k()["train"]["label"]).values()) == {500}


def some_clothes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 pictures in two parts stand for the published ones."""
    for prefix, count in {"train": 40, "t10k": 20}.items():
        pixels, labels = np.arange(count * 784).astype(np.uint8), np.arange(count).astype(np.uint8) % 10
        for name, content in {
            f"{prefix}-images-idx3-ubyte": bytes(16) + pixels.tobytes(),
            f"{prefix}-labels-idx1-ubyte": bytes(8) + labels.tobytes(),
        }.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            monkeypatch.setitem(image_samples.FASHION_SHA256, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(image_samples, "fetch_sample", lambda name: folder)


def test_fashion_mnist_keeps_its_published_parts_and_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_clothes(tmp_path, monkeypatch)
    loaded = image_samples.fashion_mnist()
    assert [len(part) for part in loaded.values()] == [40, 20]
    assert (loaded["train"].greys()[1] == np.arange(784, 1568).astype(np.uint8).reshape(28, 28)).all()
    corpus = tasks.load_data(a_recipe("task=image-classification", "data.source=sample:fashion-mnist"))
    assert (corpus.label_names[0], corpus.label_names[9]) == ("T-shirt/top", "Ankle boot")
    assert corpus.test["label"] == [*range(10), *range(10)]
    assert len(corpus.train) + len(corpus.validation) == 40
    assert len(corpus.validation)


def test_other_clothes_than_the_published_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_clothes(tmp_path, monkeypatch)
    monkeypatch.setitem(image_samples.FASHION_SHA256, "t10k-images-idx3-ubyte", "0" * 64)
    with pytest.raises(ChecksumError, match=r"t10k-images-idx3-ubyte\.gz holds sha256 .* do not trust it"):
        image_samples.fashion_mnist()


@pytest.mark.parametrize("content", [b"x", gzip.compress(bytes(999))[:-9], None], ids=["no gzip", "cut short", "gone"])
def test_damaged_clothes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    some_clothes(tmp_path, monkeypatch)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(SourceError, match=r"t10k-labels-idx1-ubyte\.gz is missing or damaged; install"):
        image_samples.fashion_mnist()


def test_the_installed_clothes_are_the_published_ones() -> None:
    try:
        sample_packages.fetch_sample("fashion-mnist")
    except SourceError:
        pytest.skip("the package dataset-fashion-mnist is not installed")
    loaded = image_samples.fashion_mnist()
    assert {part: set(Counter(found["label"]).values()) for part, found in loaded.items()} == {
        "train": {6000},
        "test": {1000},
    }
    pixels = loaded["train"].greys()
    assert pixels.shape == (60000, 28, 28)
    assert pixels.mean() / 255 == pytest.approx(0.2860, abs=5e-5)


def test_parts_follow_the_hash_of_the_group_and_not_the_seed(table: str) -> None:
    corpus = tasks.load_data(a_recipe(table, "data.columns.group=author"))

    def place(group: str) -> float:
        return int(hashlib.sha256(group.encode()).hexdigest()[:12], 16) / 16**12

    assert set(corpus.test["group"]) == {g for g in map("author {}".format, range(20)) if place(g) < 0.2}
    assert all(0.2 <= place(group) < 0.3 for group in corpus.validation["group"])
    other = tasks.load_data(a_recipe(table, "data.columns.group=author", "seed=5"))
    assert texts(other.test) == texts(corpus.test)


def test_copies_of_a_text_stay_together_without_a_group(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "a.csv", "text,label", *[f"text {row % 50},{row % 2}" for row in range(400)])
    corpus = tasks.load_data(a_recipe(source))
    assert not texts(corpus.train) & texts(corpus.test)
    assert not texts(corpus.train) & texts(corpus.validation)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_of_each_kind_hold_the_same(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    loaded = Dataset.from_dict({"text": [f"t{row}" for row in range(60)], "label": [row % 3 for row in range(60)]})
    if suffix == "csv":
        csv_file(path, "text,label", *[f"{row['text']},{row['label']}" for row in loaded])
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in loaded), encoding="utf-8")
    else:
        loaded.to_pandas().to_parquet(path)
    corpus = tasks.load_data(a_recipe(f"data.source={suffix}:{path}"))
    found = {
        row["text"]: row["label"] for part in (corpus.train, corpus.validation, corpus.test) for row in rows_of(part)
    }
    assert found == dict(zip(loaded["text"], loaded["label"], strict=True))
    assert corpus.label_names == ("0", "1", "2")


def test_the_files_of_a_folder_are_its_own_parts(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        csv_file(tmp_path / f"{part}.csv", "text,label", *[f"{part} {row},{row % 2}" for row in range(6)])
    corpus = tasks.load_data(a_recipe(f"data.source=csv:{tmp_path}"))
    assert texts(corpus.test) == {f"test {row}" for row in range(6)}
    assert texts(corpus.validation) == {f"validation {row}" for row in range(6)}
    assert texts(corpus.train) == {f"train {row}" for row in range(6)}


def test_a_folder_of_images_has_a_class_per_subfolder(tmp_path: Path) -> None:
    for name, grey in {"cat": 10, "dog": 200}.items():
        (tmp_path / name).mkdir()
        for index in range(30):
            Image.new("L", (20, 20), grey + index).save(tmp_path / name / f"{index}.png")
    corpus = tasks.load_data(a_recipe("task=image-classification", f"data.source=folder:{tmp_path}"))
    assert corpus.label_names == ("cat", "dog")
    assert sum(map(len, (corpus.train, corpus.validation, corpus.test))) == 60
    assert all((decode(row["image"], "") >= 200).all() == (row["label"] == 1) for row in rows_of(corpus.train))


def test_class_names_of_a_typed_column_are_kept(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    rows = {"text": [f"t{row}" for row in range(40)], "label": [row % 2 for row in range(40)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    corpus = tasks.load_data(a_recipe(f"data.source=parquet:{tmp_path / 'a.parquet'}"))
    assert corpus.label_names == ("spam", "ham")
    assert all(row["label"] == int(row["text"][1:]) % 2 for row in rows_of(corpus.train))


def test_columns_get_their_canonical_names_and_one_may_serve_twice(table: str) -> None:
    corpus = tasks.load_data(a_recipe(table, "data.columns={group: author, domain: author}"))
    assert corpus.train.column_names == ["text", "label", "group", "domain"]
    assert list(corpus.train["group"]) == list(corpus.train["domain"])


def test_the_column_of_a_natural_split_is_kept(table: str) -> None:
    recipe = a_recipe(table, "data.partition={kind: natural, by: author}")
    corpus = tasks.load_data(recipe)
    owned = data.partition_examples(recipe, corpus.train)
    authors = [set(corpus.train.select(rows)["author"]) for rows in owned]
    assert sum(map(len, authors)) == len(set.union(*authors)) == 20


def test_language_modelling_needs_no_label(table: str) -> None:
    corpus = tasks.load_data(a_recipe(table, "task=text-generation"))
    assert corpus.train.column_names == ["text"]
    assert corpus.label_names == ()


def test_a_limit_keeps_whole_groups_of_the_training_part_by_seed(table: str) -> None:
    whole = tasks.load_data(a_recipe(table, "data.columns.group=author"))
    limited = [
        tasks.load_data(a_recipe(table, "data.columns.group=author", "data.max_train_examples=45", f"seed={seed}"))
        for seed in (0, 0, 1)
    ]
    assert set(Counter(limited[0].train["group"]).values()) == {10}
    assert len(limited[0].train) == 40
    assert texts(limited[0].train) == texts(limited[1].train) != texts(limited[2].train)
    assert texts(limited[0].train) < texts(whole.train)
    assert texts(limited[0].test) == texts(whole.test)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_of_everything_is_what_a_run_on_the_same_source_holds_out(tmp_path: Path, part: str) -> None:
    recipe = a_recipe(csv_file(tmp_path / "rows.csv", "text,label,group", *ROWS), "data.columns.group=group")
    corpus = tasks.load_data(recipe)
    found = tasks.load_all_examples(recipe, corpus.label_names, part)
    assert found["text"][:] == getattr(corpus, part)["text"][:]
    assert 0 < len(found) < len(tasks.load_all_examples(recipe, corpus.label_names)) == len(ROWS)
