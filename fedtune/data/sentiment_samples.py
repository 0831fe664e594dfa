"""Four-domain sentiment data: Hutto & Gilbert, "VADER", ICWSM 2014; the data is MIT-licensed.

Sentences of tweets, film reviews, product reviews and newspaper editorials, with the mean of 20 human ratings in -4..4.
Sentences of one review or article share an id. They form a group, which is never divided.
"""

import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.column import Values, objects
from fedtune.data.table import Table
from fedtune.errors import SourceError
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample

__all__ = ["films", "sentiment"]

MAX_NEUTRAL_RATING = 0.25
FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


def sentiment() -> dict[str, Table]:
    """Return the columns text, label (negative or positive, by the sign of the rating), rating, group and domain.

    Sentences with a rating within 0.25 of zero count as neutral and are left out.
    """
    rows = [row for row in _read() if abs(row["rating"]) > MAX_NEUTRAL_RATING]
    labelled = [row | {"label": "positive" if row["rating"] > 0 else "negative"} for row in rows]
    return {"train": _table(labelled, ("text", "rating", "group", "domain", "label"))}


def films() -> dict[str, Table]:
    """Return the columns text and group: every sentence of the film reviews, as plain text for language modelling."""
    return {"train": _table([row for row in _read() if row["domain"] == "movies"], ("text", "group"))}


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    of = {name: [row[name] for row in rows] for name in names}
    return Table({name: Values(np.array(of[name]) if name == "rating" else objects(of[name])) for name in names})


def _read() -> list[dict[str, Any]]:
    """Read the four files from the inner archive in memory. Nothing is extracted to disk."""
    archive = fetch_sample("sentiment") / SAMPLE_PACKAGES["sentiment"].members[0]
    rows = []
    with tarfile.open(archive) as opened:
        for domain, file in FILES.items():
            member = opened.extractfile(f"hutto_ICWSM_2014/{file}")
            if member is None:
                raise SourceError(f"{archive} holds no plain file {file}; fetch the sample again")
            rows += [_row(domain, line) for line in member.read().decode("utf-8").splitlines() if line]
    return rows


def _row(domain: str, line: str) -> dict[str, Any]:
    identity, rating, text = line.split("\t", 2)
    return {
        "text": text.strip(),
        "rating": float(rating),
        "group": f"{domain}/{identity.partition('_')[0]}",
        "domain": domain,
    }
