"""Every command in the documentation, the recipes, the help texts and the sentences of the program parses."""

import ast
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
SOURCES = sorted((ROOT / "fedtune").rglob("*.py"))
SAID = re.compile(r"\bfedtune ([a-z][\w-]*(?: [^\s;,:?()\"`]+)*)")
"""A command in a sentence, up to the next punctuation that no command has."""
PROSE = {
    "again",
    "authority",
    "cannot",
    "does",
    "executes",
    "is",
    "knows",
    "memory",
    "on",
    "or",
    "speaks",
    "that",
    "understand",
    "with",
    "wrote",
}
"""Words after the name of the program where a sentence is about the program itself."""
HOLE = "5"
"""What stands for a value that a sentence is given when it is said: a run, a name or a number."""
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
        # a sentence may name an option without the command's arguments, and --help
        with suppress(click.MissingParameter, click.exceptions.Exit):
            command.make_context(name, list(words))


def list_sentences(source: str) -> Iterator[str]:
    """The string constants of a module with a hole for each value, without docstrings and pieces of other strings."""
    if not re.search(r"(?<!from )fedtune [a-z]", source):
        return
    tree = ast.parse(source)
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in pieces | docstrings:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(one.value) if isinstance(one, ast.Constant) else HOLE for one in node.values)


def find_said(source: str) -> list[list[str]]:
    """The words of each command in the sentences of a module, up to the first that is prose."""
    found = [said.rstrip(".").split() for text in list_sentences(source) for said in SAID.findall(text)]
    return [cut_prose(words) for words in found if words[0] not in PROSE]


def cut_prose(words: list[str]) -> list[str]:
    """The command's own words, and of what follows options and what is no word of a sentence."""
    command: click.Command | None = cli
    path: list[str] = []
    while isinstance(command, click.Group) and len(path) < len(words):
        path.append(words[len(path)])
        command = command.get_command(click.Context(command), path[-1])
    rest = words[len(path) :]
    prose = (number for number, word in enumerate(rest) if word.rstrip(".").isalpha() and not word.isupper())
    return [*path, *(word.rstrip(".") for word in rest[: next(prose, len(rest))])]


def test_what_is_found_and_what_is_refused() -> None:
    page = "fedtune is\n```\n$ fedtune merge a \\\n   b\n```\nsee `fedtune runs list`"
    assert find_documented(page, markdown=True) == ["fedtune merge a b", "fedtune runs list"]
    assert find_documented("name: a\n# Run:  fedtune simulate r.yaml") == ["fedtune simulate r.yaml"]
    check_words(split_words("fedtune evaluate latest --split test   # a comment"))
    with pytest.raises(AssertionError):
        check_words(["evaluate", "latest", "--part", "test"])
    with pytest.raises(click.UsageError):
        check_words(["evaluate", "latest", "--splitt", "test"])


def test_what_is_found_in_sentences_and_what_is_refused() -> None:
    source = """
def show(run):
    '''Docs of fedtune nothing.'''
    raise ValueError(f"no such round; see: fedtune runs show {run} "
                     "--last 3, or ask")
    print("fedtune server sits here", "fedtune runs", "fedtune knows", 'type fedtune runs destroy X --now.')
"""
    shown, server, group, wrong = find_said(source)
    assert shown == ["runs", "show", HOLE, "--last", "3"]
    assert (server, group) == (["server", "sits"], ["runs"])
    assert wrong == ["runs", "destroy", "X", "--now"]
    check_words(shown)
    check_words(group)
    for bad in (server, wrong):
        with pytest.raises(AssertionError):
            check_words(bad)


def test_every_command_that_a_sentence_of_the_program_names_exists() -> None:
    said = [(path, words) for path in SOURCES for words in find_said(path.read_text(encoding="utf-8"))]
    assert len(said) > 50
    wrong: list[str] = []
    for path, words in said:
        try:
            check_words(words)
        except click.BadOptionUsage:
            pass  # its value is a word of the sentence
        except (AssertionError, click.UsageError) as error:
            wrong.append(f"{path.relative_to(ROOT)}: fedtune {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


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
