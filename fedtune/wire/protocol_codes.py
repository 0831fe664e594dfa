"""The codes that a device sends instead of an update: a fixed table of codes with integer counts.

Free text could reveal a device's data: an error about a label quotes the label, and one about a file quotes its path.
The device writes the details to its own log. It sends only a code and counts, such as ``unknown-labels rows=3``. The
server looks up the sentence here. This module must not import torch, because a device's small process imports it.
"""

import re
from collections.abc import Mapping
from string import Formatter
from typing import NamedTuple

__all__ = ["LACKS_BASE", "LACKS_PLUG_IN", "SENTENCES", "Problem", "parse_problem"]

LACKS_BASE = "base-lacking"
"""The device lacks the base weights that its train request refers to. The server then sends them in full."""
LACKS_PLUG_IN = frozenset({"metric-unavailable", "source-unreadable", "unit-unavailable"})
"""What a device may reply that lacks a package which publishes something the recipe names."""
SENTENCES: Mapping[str, str] = {
    LACKS_BASE: "it lacks base weights that its train request is based on",
    "attack-refused": "the recipe has an attack, which only simulated clients may make",
    "code-failed": "training raised an error",
    "data-columns": "its data lack {columns} of the columns that the recipe names",
    "data-values": "some of its examples have no value in a column that the recipe names",
    "data-unfit": "its data do not fit the recipe",
    "device-outdated": "its fedtune speaks protocol {device} and the server's protocol {server}; update fedtune on the "
    "device",
    "disk-failed": "its disk cannot be read or written",
    "memory-model": "holding model and data takes more than the {allowed_mb} MB this device allows",
    "memory-damaged": "what it remembers of earlier tasks was changed or is of another run; fedtune device forget on "
    "the device starts anew",
    "memory-lost": "it has lost what the algorithm of the run kept on it, as after a rollback; start a new run",
    "memory-key": "its key for what it remembers of earlier tasks cannot be used",
    "memory-plan": "no plan of the run fits the {allowed_mb} MB that this device allows, and the smallest needs "
    "{needed_mb} MB; allow that with fedtune device join --memory",
    "memory-short": "it ran out of memory",
    "memory-step": "a step needs about {needed_mb} MB of memory, and this device allows {allowed_mb} MB",
    "memory-training": "training held more than the {allowed_mb} MB this device allows and was ended",
    "metric-unavailable": "it lacks what computes evaluation.metrics; install scikit-learn, or the package that "
    "publishes the metric, on the device, or drop the metric",
    "model-unfit": "it cannot build the recipe's model",
    "no-task": "it has no task in this round, as stream.arrival says",
    "no-task-examples": "it has no example of the task",
    "order-unreadable": "it cannot read the train request; update fedtune on the device",
    "privacy-broken": "it would send more than the recipe's privacy allows",
    "recipe-unknown": "its fedtune does not understand the recipe; update fedtune on the device",
    "replay-short": "{bytes} bytes are too few to store an example of each of {groups} classes or tasks; {empty} would "
    "have none",
    "server-outdated": "the server's fedtune speaks protocol {server} and the device's protocol {device}; update "
    "fedtune on the server",
    "source-unreadable": "it cannot read a source that the recipe or --data names",
    "storage-exceeded": "what it would store of a task takes {needed_kb} kB, and its budget allows {allowed_kb} kB",
    "storage-short": "it may have to store {needed_kb} kB more, and its disk has {free_kb} kB left",
    "trainer-ended": "its trainer ended with code {code}, {tries} times",
    "trainer-killed": "its trainer was killed by signal {signal}, {tries} times; free memory on the device",
    "unit-unavailable": "it lacks a technique, task, merge step or partition that the recipe names; install the "
    "package that publishes it on the device",
    "unknown-labels": "{rows} of its examples have labels that are none of the recipe's classes",
}
"""The meaning of each code. The names in braces are the counts sent with it."""

_LOG = "; details are in the device's own log"
_MOST = 10**15
_COUNT = r"[a-z_]{1,20}=\d{1,16}"
_TEXT = re.compile(rf"([a-z-]{{1,40}})((?: {_COUNT}){{0,8}})")


class Problem(NamedTuple):
    """A code of :data:`SENTENCES` and its counts."""

    code: str
    counts: Mapping[str, int] = {}

    @property
    def text(self) -> str:
        """The text to send. An unknown code, or counts that do not belong to it, become ``code-failed``."""
        if _names(self.code) != set(self.counts):
            return "code-failed"
        return " ".join([self.code, *(f"{name}={_bounded(count)}" for name, count in sorted(self.counts.items()))])

    @property
    def sentence(self) -> str:
        """The sentence shown on the device."""
        return SENTENCES[self.code].format_map(self.counts)

    @property
    def remote_sentence(self) -> str:
        """The sentence shown on the server, with a pointer to the device's log."""
        return self.sentence + _LOG


def parse_problem(text: str) -> Problem | None:
    """Parse a device's text. Return None unless it is a known code with exactly its counts, each at most 10**15."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    pairs = [item.split("=") for item in found[2].split()]
    counts = {name: int(digits) for name, digits in pairs}
    known = len(counts) == len(pairs) and _names(found[1]) == set(counts)
    return Problem(found[1], counts) if known and max(counts.values(), default=0) <= _MOST else None


def _names(code: str) -> set[str] | None:
    """Return the names of a code's counts, or None for an unknown code."""
    sentence = SENTENCES.get(code)
    return None if sentence is None else {name for _, name, _, _ in Formatter().parse(sentence) if name}


def _bounded(count: int) -> int:
    return max(0, min(_MOST, int(count)))
