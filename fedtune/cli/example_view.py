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
    from fedtune.errors import FedtuneError

    task = tasks.get_task(recipe.task)
    if not task.reads_text:
        if count:
            raise click.UsageError(f"--examples prints texts, but {task.name} has none")
        return []
    rows = range(min(_USUAL_COUNT if count is None else count, len(corpus.train)))
    if not rows:
        return []
    try:
        reader = task.load_reader(recipe)
    except FedtuneError as error:
        if count is not None:
            raise
        click.echo(f"warning: no examples are shown: {error}", err=True)
        return []
    encoded = task.encode_examples(corpus.train.select(rows), recipe, reader)
    return [task.decode_example(encoded.make_batch([row]), reader, corpus.label_names) for row in rows]


def show_examples(examples: "Sequence[Sequence[Segment]]") -> None:
    """Print targets bold and in double brackets, the rest dim."""
    for number, segments in enumerate(examples, 1):
        click.secho(f"example {number}:", underline=True)
        click.echo("".join(map(_style, segments)))


def _style(segment: "Segment") -> str:
    from fedtune.untrusted import clean_text

    text = clean_text(segment.text, _LONGEST)
    return click.style(f"[[{text}]]", bold=True) if segment.target else click.style(text, dim=True)
