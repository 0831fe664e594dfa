"""The forms in which people keep conversations, and which of them a table has."""

from collections.abc import Collection, Sequence

from fedtune.errors import DataError
from fedtune.recipe.data_settings import ColumnSettings
from fedtune.recipe.schema import Recipe

__all__ = ["ANY_FORM", "CONVERSATION_FORMS", "find_conversation_form", "resolve_text_column"]

ANY_FORM = "text-or-messages"
"""What a task asks for that reads texts and conversations alike; the columns of the data decide."""
CONVERSATION_FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "conversations": ("conversations",),
}
"""The keys of ``data.columns`` whose columns each form needs. ``tools`` and ``input`` may stand beside them."""


def find_conversation_form(recipe: Recipe, needed: Sequence[str], present: Collection[str]) -> str | None:
    """The form of the conversations that a task asks for; None where it asks for texts or anything else.

    DataError when the columns fit several forms, or a named one has not all its columns.
    """
    asked = needed[0] if needed else ""
    form = _choose(recipe, present) if asked == ANY_FORM else asked
    if form not in CONVERSATION_FORMS:
        return None
    for key in CONVERSATION_FORMS[form]:
        if (column := getattr(recipe.data.columns, key)) not in present:
            raise DataError(
                f"{recipe.data.title} has no column {column!r}, which data.columns.{key} names for conversations as "
                f"{form}; name the column that holds it, or another format of the task",
                code="data-columns",
                counts={"columns": 1},
            )
    return form


def resolve_text_column(needed: Sequence[str]) -> tuple[str, ...]:
    """The columns that a task needs where the data are texts."""
    return tuple("text" if name == ANY_FORM else name for name in needed)


def _choose(recipe: Recipe, present: Collection[str]) -> str:
    """The only form whose columns are there; a column that the recipe calls otherwise than usual decides."""
    keys = {"text": ("text",), **CONVERSATION_FORMS}
    columns, usual = recipe.data.columns, ColumnSettings()
    fitting = [form for form in keys if all(getattr(columns, key) in present for key in keys[form])]
    named = [form for form in fitting if any(getattr(columns, key) != getattr(usual, key) for key in keys[form])]
    found = named or fitting
    if len(found) > 1:
        raise DataError(
            f"{recipe.data.title} has columns for {' and '.join(found)}; say which to train on, e.g. "
            f"task: {{text-generation: {{format: {found[-1]}}}}}"
        )
    return found[0] if found else "text"
