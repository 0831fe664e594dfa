"""Definitions of nouns, read from a small file in WordNet's format by a stand-in for dpkg."""

from pathlib import Path

import pytest

from fedtune.data import wordnet_samples
from fedtune.data.table import Classes
from fedtune.errors import SourceError

LICENCE = "  1 This software and database is being provided to you\n"


def write_entry(number: int, category: int, gloss: str) -> str:
    return f"{number:08d} {category:02d} n 01 word 0 001 @ 00000001 n 0000 | {gloss}  \n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that dpkg names."""
    dpkg = tmp_path / "dpkg"
    dpkg.write_text(f"#!/bin/sh\necho {tmp_path}/index.noun; echo {tmp_path}/data.noun\n")
    dpkg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "data.noun"


def test_a_definition_has_its_category_and_no_example_sentences(file: Path) -> None:
    entries = [
        write_entry(1, 20, "a tree with needles"),
        write_entry(2, 5, 'a bird that swims; | not | flies; "the penguin dived"'),
        write_entry(3, 20, "a tree with needles"),
    ]
    file.write_text(LICENCE + "".join(entries), encoding="utf-8")
    table = wordnet_samples.list_noun_definitions()["train"]
    kind = table.kinds["label"]
    assert isinstance(kind, Classes)
    assert kind.names == ("animal", "plant")  # the order of WordNet's files
    assert list(table["text"]) == ["a bird that swims; | not | flies", "a tree with needles", "a tree with needles"]
    assert list(table["label"]) == [0, 1, 1]
    assert table["group"][1] == table["group"][2]


def test_the_even_sample_has_at_most_400_of_each_category_that_has_300(file: Path) -> None:
    sizes = {4: 500, 5: 300, 6: 299}
    lines = [write_entry(n, category, f"{category} {n}") for category, size in sizes.items() for n in range(size)]
    file.write_text("".join(lines), encoding="utf-8")
    table = wordnet_samples.list_even_noun_definitions()["train"]
    labels = list(table["label"])
    assert table.kinds["label"] == Classes(("act", "animal"))
    assert [labels.count(number) for number in (0, 1)] == [400, 300]
    file.write_text("".join(reversed(lines)), encoding="utf-8")
    again = wordnet_samples.list_even_noun_definitions()["train"]
    assert sorted(again["text"]) == sorted(table["text"])  # the order of the file decides nothing


@pytest.mark.parametrize("text", ["00000001 99 n 01 word 0 000 | gloss\n", "word\n", "00000001 04 n 01 word 0 000\n"])
def test_another_file_is_refused(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=r"is not a file of WordNet 3\.0's nouns; install wordnet-base again"):
        wordnet_samples.list_noun_definitions()


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="apt-get install wordnet-base"):
        wordnet_samples.list_noun_definitions()


def test_the_missing_file_is_named(file: Path) -> None:
    with pytest.raises(SourceError, match=rf"{file} cannot be read .* install wordnet-base again"):
        wordnet_samples.list_noun_definitions()
