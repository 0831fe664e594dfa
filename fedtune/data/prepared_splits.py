"""Open what a builder of ``datasets`` has prepared, one Arrow file at a time.

To open a file touches a page of each of its record batches, and the system maps fifteen more around it: 5 GB of text
would hold 280 MB of pages at once before anything is read. They are dropped between the files.
"""

from datasets import Dataset, DatasetBuilder, concatenate_datasets
from datasets.arrow_reader import ArrowReader

from fedtune.data.mapped_pages import MappedPages

__all__ = ["open_prepared_splits"]


def open_prepared_splits(builder: DatasetBuilder) -> dict[str, Dataset]:
    """Prepare the data of a builder in its cache unless it is there, and open each split, memory-mapped."""
    builder.download_and_prepare()
    return {str(split): _open_split(builder, str(split)) for split in builder.info.splits or ()}


def _open_split(builder: DatasetBuilder, split: str) -> Dataset:
    pages, parts = MappedPages(), []
    reader = ArrowReader(builder.cache_dir, builder.info)
    for file in reader.get_file_instructions(builder.dataset_name, split, (builder.info.splits or {}).values()):
        parts.append(Dataset.from_file(file["filename"], info=builder.info.copy(), split=split))
        pages.drop_read()
    return concatenate_datasets(parts)
