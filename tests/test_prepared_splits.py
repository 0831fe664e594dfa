"""Arrow files of a builder are opened one after another, and hold what the library's own loader gives."""

from pathlib import Path

import pytest
from datasets import load_dataset, load_dataset_builder

from fedtune.data.mapped_pages import MappedPages
from fedtune.data.prepared_splits import open_prepared_splits


def test_splits_are_those_of_the_loader_and_pages_are_dropped_after_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"train": ("one", "two", "three"), "test": ("four",)}
    files = {part: [str(tmp_path / f"{name}.csv") for name in inner] for part, inner in names.items()}
    for number, file in enumerate(file for inner in files.values() for file in inner):
        rows = [f"text {row},{row % 3}" for row in range(50 + number)]
        Path(file).write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    cache = str(tmp_path / "cache")
    dropped: list[MappedPages] = []
    monkeypatch.setattr("fedtune.data.mapped_pages.MappedPages.drop_read", lambda self: dropped.append(self))
    builder = load_dataset_builder("csv", data_files=files, cache_dir=cache)
    builder.download_and_prepare(max_shard_size=500)
    found = open_prepared_splits(builder)
    shards = {part: len(list(Path(builder.cache_dir).glob(f"csv-{part}*.arrow"))) for part in files}
    wanted = load_dataset("csv", data_files=files, cache_dir=cache)
    assert {part: split.to_dict() for part, split in found.items()} == {
        part: split.to_dict() for part, split in wanted.items()
    }
    assert found["train"].features == wanted["train"].features
    assert len(dropped) == sum(shards.values()) > len(files)
    assert found["train"].cache_files, "the files are mapped, not read"
