"""Conversations that a package ships: chatterbot-corpus, the English part (BSD licence).

Short questions and replies, written to try chat programs with: good to see that training works, not what it is worth.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.data.column import Values, objects
from fedtune.data.table import Table
from fedtune.errors import SourceError
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample

__all__ = ["chatterbot", "replies"]

_SPEAKERS = ("user", "assistant")
LONGEST_REPLY = 200
"""Characters of a reply in ``replies``: longer ones would not fit into the short texts that its recipes train on."""


def chatterbot() -> dict[str, Table]:
    """Columns messages, group, domain: user and assistant in turn. The domain is the topic.

    Conversations that begin alike on one topic are a group, because many replies to one question are given.
    """
    return {"train": _make_table([row for topic in _read_topics() for row in topic])}


def replies() -> dict[str, Table]:
    """Columns question, reply, other_reply, group, domain: the first two turns of each conversation.

    Replies have at most 200 characters. The other reply is one to another question of the same topic, and never one
    that this question has too.
    """
    return {"train": _make_table([row for topic in _read_topics() for row in _add_other_replies(topic)])}


def _read_topics() -> list[list[dict[str, Any]]]:
    """The conversations of each topic."""
    folder = fetch_sample("chatterbot")
    return [_read_topic(folder / member) for member in SAMPLE_PACKAGES["chatterbot"].members]


def _make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table({name: Values(objects(row[name] for row in rows)) for name in rows[0]})


def _add_other_replies(topic: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pair each question with its reply and with the nearest fitting one, from half of the topic further on."""
    pairs = [(row, *(turn["content"] for turn in row["messages"][:2])) for row in topic if row["messages"]]
    pairs = [pair for pair in pairs if len(pair[2]) <= LONGEST_REPLY]
    own: dict[str, set[str]] = {}
    for row, _, reply in pairs:
        own.setdefault(row["group"], set()).add(reply)
    for place, (row, question, reply) in enumerate(pairs):
        start = place + len(pairs) // 2
        others = (pairs[number % len(pairs)][2] for number in range(start, start + len(pairs)))
        other = next((text for text in others if text not in own[row["group"]]), None)
        if other is not None:  # a topic of a single question has no other reply
            names = {"question": question, "reply": reply, "other_reply": other}
            yield {**names, "group": row["group"], "domain": row["domain"]}


def _read_topic(file: Path) -> list[dict[str, Any]]:
    import yaml  # imported here: only this sample needs it

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
