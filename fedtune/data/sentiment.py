"""Four-domain sentiment: Hutto & Gilbert, "VADER", ICWSM 2014; the data is MIT-licensed.

Sentences of tweets, film reviews, product reviews and newspaper editorials with the mean of 20 human ratings in -4..4.
Sentences of one review or article share an id, so they form a group that no split may cut.
"""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedtune.data.table import Table
from fedtune.errors import SourceError
from fedtune.files import writing
from fedtune.home import cache
from fedtune.samples import PACKAGES, fetch

__all__ = ["films", "sentiment"]

NEUTRAL = 0.25
FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


def sentiment() -> dict[str, Table]:
    """Columns text, label (negative or positive: the rating's sign), rating, group, domain.

    Sentences with a rating of at most 0.25 to either side count as neutral and are left out.
    """
    table = _table()
    table = table.filter(pc.greater(pc.abs(table["rating"]), NEUTRAL))
    label = pc.if_else(pc.greater(table["rating"], 0), "positive", "negative")
    return {"train": Table(table.append_column("label", label))}


def films() -> dict[str, Table]:
    """Columns text, group: every sentence of the film reviews, as plain text for language modelling."""
    table = _table()
    return {"train": Table(table.filter(pc.equal(table["domain"], "movies")).select(["text", "group"]))}


def _table() -> pa.Table:
    """All sentences, converted to parquet once."""
    path = cache() / "sentiment" / f"{PACKAGES['sentiment'].sha256}.parquet"
    if not path.is_file():
        with writing(path) as beside:
            pq.write_table(_read(fetch("sentiment") / PACKAGES["sentiment"].members[0]), beside)
    return pq.read_table(path)


def _read(archive: Path) -> pa.Table:
    """The four wanted members, read in memory: nothing of the inner archive is written to disk."""
    rows = []
    with tarfile.open(archive) as opened:
        for domain, file in FILES.items():
            member = opened.extractfile(f"hutto_ICWSM_2014/{file}")
            if member is None:
                raise SourceError(f"{archive} holds no plain file {file}; fetch the sample again")
            rows += [_row(domain, line) for line in member.read().decode("utf-8").splitlines() if line]
    return pa.Table.from_pylist(rows)


def _row(domain: str, line: str) -> dict[str, str | float]:
    identity, rating, text = line.split("\t", 2)
    return {
        "text": text.strip(),
        "rating": float(rating),
        "group": f"{domain}/{identity.partition('_')[0]}",
        "domain": domain,
    }
