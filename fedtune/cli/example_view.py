"""Training examples as a model reads them, with what of them is a target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fedtune.data import DataSplits
    from fedtune.recipe.schema import Recipe
    from fedtune.tasks import Segment

__all__ = ["decode_examples", "show_examples"]


_USUAL_COUNT = 3
_LONGEST = 4000
"""Characters of a segment that are printed."""


def decode_examples(recipe: "Recipe", corpus: "DataSplits", count: int | None) -> "list[list[Segment]]":
    """The first training examples as text; UsageError for a task whose examples are no texts.

    Without a count, there are three of texts. A model that cannot be loaded is then no reason to refuse the rest.
    """
    from fedtune import tasks
    from fedtune.errors import ModelError

    reads_text = tasks.get_task(recipe.task).reads_text
    if count is None:
        try:
            return _decode(recipe, corpus, _USUAL_COUNT if reads_text else 0)
        except ModelError as error:
            click.echo(f"warning: no examples are shown: {error}", err=True)
            return []
    if count and not reads_text:
        raise click.UsageError(f"--examples prints texts, but {recipe.task.name} has none")
    return _decode(recipe, corpus, count)


def _decode(recipe: "Recipe", corpus: "DataSplits", count: int) -> "list[list[Segment]]":
    from fedtune import tasks

    task, count = tasks.get_task(recipe.task), min(count, len(corpus.train))
    if not count:
        return []
    reader = task.load_reader(recipe)
    encoded = task.encode_examples(corpus.train.select(range(count)), recipe, reader)
    return [task.decode_example(encoded.make_batch([row]), reader, corpus.label_names) for row in range(len(encoded))]


def show_examples(examples: "Sequence[Sequence[Segment]]") -> None:
    """Print targets bold and in double brackets, the rest dim."""
    for number, segments in enumerate(examples, 1):
        click.secho(f"example {number}:", underline=True)
        click.echo("".join(map(_style, segments)))


def _style(segment: "Segment") -> str:
    from fedtune.untrusted import clean_text

    text = clean_text(segment.text, _LONGEST)
    return click.style(f"[[{text}]]", bold=True) if segment.target else click.style(text, dim=True)
