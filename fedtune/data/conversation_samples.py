"""Conversations that a package ships: chatterbot-corpus, the English part (BSD licence).

Short questions and replies, written to try chat programs with: good to see that training works, not what it is worth.
"""

from pathlib import Path
from typing import Any

import yaml

from fedtune.data.column import Values, objects
from fedtune.data.table import Table
from fedtune.errors import SourceError
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample

__all__ = ["chatterbot"]

_SPEAKERS = ("user", "assistant")


def chatterbot() -> dict[str, Table]:
    """Columns messages, group, domain: user and assistant in turn. The domain is the topic.

    Conversations that begin alike on one topic are a group, because many replies to one question are given.
    """
    folder = fetch_sample("chatterbot")
    rows = [row for member in SAMPLE_PACKAGES["chatterbot"].members for row in _read_topic(folder / member)]
    return {"train": Table({name: Values(objects(row[name] for row in rows)) for name in rows[0]})}


def _read_topic(file: Path) -> list[dict[str, Any]]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    except (OSError, yaml.YAMLError, KeyError) as error:
        raise SourceError(f"{file} holds no conversations; fetch the sample again") from error
    return [_make_row(file.stem, [text.strip() for text in turns]) for turns in found]


def _make_row(topic: str, turns: list[str]) -> dict[str, Any]:
    """A conversation, without a last question that nobody replies to."""
    answered = turns[: len(turns) // 2 * 2]
    messages = [{"role": _SPEAKERS[place % 2], "content": text} for place, text in enumerate(answered)]
    return {"messages": messages, "group": f"{topic}/{turns[0].lower()}", "domain": topic}
