"""Every command in the documentation, the recipes and the help texts parses."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from fedtune.cli.main import cli
from fedtune.cli.old_names import translate_old_names
from tests.test_old_names import find_command

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.yaml")),
]
LINE = re.compile(r"^ *(?:\$ |#\s+(?:[A-Z][\w ]*:\s+)?)?(?:FEDTUNE_HOME=\S+ )?(fedtune [a-z].*)$", re.MULTILINE)
IN_TEXT = re.compile(r"(?<!`)`(fedtune [a-z]+[^`.]*)`(?!`)")
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"RUN", "RECIPE", "N", "NAME", "FILE", "TOKEN", "DEVICE", "SERVER", "CONFIG", "[RUN]"}


def list_commands(path: str = "") -> Iterator[str]:
    command = find_command(path)
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from list_commands(f"{path} {name}".strip())
    elif path:
        yield path


def find_documented(text: str, *, markdown: bool = False) -> list[str]:
    """Lines that are commands; of a Markdown page those in blocks, and code inside a sentence."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    if not markdown:
        return LINE.findall(joined)
    return [*LINE.findall("\n".join(BLOCK.findall(joined))), *IN_TEXT.findall(BLOCK.sub("", joined))]


def split_words(line: str) -> list[str]:
    """The words of each command, without what is piped into it and without a comment."""
    words = shlex.split(line.partition(" | ")[0], comments=True)
    return ["5" if word == "N" else word for word in words[1:]]


def check_words(words: list[str]) -> None:
    translated, notices = translate_old_names(words)
    assert (translated, notices) == (words, [])
    command: click.Command = cli
    name = "fedtune"
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"{name} has no command {words[0]}"
        command, name, words = found, words[0], words[1:]
    if words and not isinstance(command, click.Group):
        with suppress(click.MissingParameter):  # a sentence may name an option without the command's arguments
            command.make_context(name, list(words))


def test_what_is_found_and_what_is_refused() -> None:
    page = "fedtune is\n```\n$ fedtune merge a \\\n   b\n```\nsee `fedtune runs list`"
    assert find_documented(page, markdown=True) == ["fedtune merge a b", "fedtune runs list"]
    assert find_documented("name: a\n# Run:  fedtune simulate r.yaml") == ["fedtune simulate r.yaml"]
    check_words(split_words("fedtune evaluate latest --split test   # a comment"))
    with pytest.raises(AssertionError):
        check_words(["evaluate", "latest", "--part", "test"])
    with pytest.raises(click.UsageError):
        check_words(["evaluate", "latest", "--splitt", "test"])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_parse(page: Path) -> None:
    for line in find_documented(page.read_text(encoding="utf-8"), markdown=page.suffix == ".md"):
        words = split_words(line)
        if "${names}" not in words and len(words) > 1 and not PLACEHOLDERS & set(words[1:2]):
            check_words(words)


@pytest.mark.parametrize("path", list(list_commands()))
def test_every_command_has_an_example_that_parses(path: str) -> None:
    text = find_command(path).help or ""
    _, example, lines = text.partition("Example:")
    assert example, "the help shows an example"
    examples = find_documented("\n".join(line.strip() for line in lines.splitlines()))
    assert examples
    for line in examples:
        assert line.startswith(f"fedtune {path}")
        check_words(split_words(line))
