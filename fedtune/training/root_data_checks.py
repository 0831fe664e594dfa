"""Checks of a merge that compares updates with one of the server's own."""

from fedtune.errors import RecipeError
from fedtune.merging import CombineStep, FlTrust
from fedtune.recipe.schema import Recipe

__all__ = ["check_root_data"]


def check_root_data(recipe: Recipe, combine: CombineStep) -> None:
    """Raise RecipeError for missing root data, and for root data that may hold test examples."""
    if not isinstance(combine, FlTrust):
        return
    if combine.root_data is None:
        raise RecipeError(
            "merge: fltrust trains an update on examples of the server's own, but root_data is not set; set fltrust: "
            "{root_data: validation}, or a source such as csv:FILE"
        )
    if combine.root_data in _list_sources(recipe):
        raise RecipeError(
            f"merge: fltrust: root_data {combine.root_data} is also a source of the run's data, whose test examples "
            "would then take part in training; set root_data to validation, or to another source"
        )
    if recipe.stream is not None:
        raise RecipeError(
            "merge: fltrust has root data of one task, and a stream has several; merge by geometric-median, or drop "
            "the stream"
        )


def _list_sources(recipe: Recipe) -> set[str | None]:
    data = recipe.data
    return {data.source, data.train, data.test, *(one.source for one in data.sources or [])}
