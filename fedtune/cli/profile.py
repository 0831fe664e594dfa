"""``fedtune profile``: measure the cost of a training step with each technique."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.recipe.task_settings import list_task_names

if TYPE_CHECKING:
    from fedtune.profiling import ProfileCase, ProfileResult
    from fedtune.recipe.schema import Recipe, Unit

__all__ = ["profile"]


@click.command()
@click.argument("path", metavar="[RECIPE]", type=click.Path(path_type=Path), required=False)
@click.option("--model", metavar="SOURCE", help="Instead of a recipe: a model with random inputs.")
@click.option("--task", type=click.Choice(list_task_names()), help="Task of --model.")
@click.option("--techniques", metavar="A,B,C+D", help="Techniques to measure, or all.  [default: the recipe's]")
@click.option("--batch", metavar="N", help="Short for --set train.batch_size=N.")
@click.option("--length", metavar="N", help="Short for --set train.max_length=N: tokens per text.")
@click.option("--image", metavar="N", help="Short for --set train.image_size=N: pixels.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("--check", is_flag=True, help="Compare gradients with those of stored activations.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plot (.png or .svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def profile(
    path: Path | None,
    model: str | None,
    task: str | None,
    techniques: str | None,
    batch: str | None,
    length: str | None,
    image: str | None,
    overrides: tuple[str, ...],
    check: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure activation memory, time and sent bytes of a training step with each technique.

    full, lora, lora+checkpointing and qlora are measured for comparison. Each case runs in its own process, one at a
    time.

    Techniques may have settings, in YAML: --techniques "lora: {rank: 4}, [qlora: {rank: 4}, checkpointing]".

    \b
    Example:
      fedtune profile recipes/sentiment.yaml --techniques bias,full+gradient-checkpointing
      fedtune profile --model sample:minilm --task text-classification --check
    """
    short = {"batch_size": batch, "max_length": length, "image_size": image}
    added = (*overrides, *(f"train.{key}={value}" for key, value in short.items() if value is not None))
    wanted = _recipe(path, model, task, added)
    if output is not None:
        from fedtune.profiling.profile_chart import parse_image_format

        parse_image_format(output)
    found = _cases(wanted, _asked(wanted, techniques, given=path is not None), random=path is None, check=check)
    rows = _measured(found)
    from fedtune import tasks

    _show(tasks.resolve_reader(wanted), rows, random=path is None, output=output, as_json=as_json)


def _recipe(path: Path | None, model: str | None, task: str | None, overrides: Sequence[str]) -> "Recipe":
    """The recipe of the file, or one made up around a model; its data is never read."""
    from fedtune.cli.cached_export import with_base
    from fedtune.recipe.yaml_file import parse_recipe, read_recipe

    if path is not None and model is None and task is None:
        return with_base(read_recipe(path, overrides), None)
    if path is not None or model is None or task is None:
        raise click.UsageError("name either a RECIPE or --model with --task, e.g. recipes/sentiment.yaml")
    import yaml

    train = {"local_steps": 1, "batch_size": 16, "max_length": 128}
    made_up = {
        "version": 2,
        "name": _name(model),
        "task": task,
        "model": {"source": model},
        "data": {"source": "random"},
    }
    text = yaml.safe_dump({**made_up, "devices": [{"count": 1}], "train": train, "federation": {"rounds": 1}})
    return with_base(parse_recipe(text, "--model", overrides), None)


def _name(model: str) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "-", Path(model.rpartition(":")[2]).stem.lower()).strip("-")[:64] or "model"


def _asked(recipe: "Recipe", text: str | None, given: bool) -> "list[list[Unit]]":
    """Lists of techniques from YAML such as ``a, b+c, [lora: {rank: 4}, d]``, or all; without any, the recipe's own."""
    if text is None:
        return [recipe.train.techniques] if given else []
    if text == "all":
        from fedtune.profiling import list_profiled_techniques

        return list_profiled_techniques()
    from fedtune.errors import RecipeError
    from fedtune.recipe.yaml_text import YamlError, load

    try:
        items = load(f"[{text}]")
    except YamlError as error:
        raise RecipeError(f"--techniques {text}: write it as a,b,c+d") from error
    return [_units(recipe, item) for item in items]


def _units(recipe: "Recipe", item: Any) -> "list[Unit]":
    from pydantic import ValidationError

    from fedtune.errors import RecipeError
    from fedtune.recipe.schema import Train
    from fedtune.recipe.validation_errors import explain_validation_error

    settings = recipe.train.model_dump(mode="json")
    try:
        one_or_more = item if isinstance(item, str | list) else [item]
        return Train.model_validate({**settings, "techniques": one_or_more}).techniques
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, Train, f"--techniques {item}")) from error


def _cases(recipe: "Recipe", asked: "list[list[Unit]]", *, random: bool, check: bool) -> "list[ProfileCase]":
    """What to measure; whatever can be refused is refused here, before the first step."""
    from fedtune import profiling, tasks
    from fedtune.models.sources import resolve_model_source
    from fedtune.wire.client_update import pack

    profiling.make_profile_cases(recipe, asked, (), None)
    resolve_model_source(recipe.model.source)
    if random:
        labels = ("no", "yes") if tasks.get_task(recipe.task).has_new_head else ()
        return profiling.make_profile_cases(recipe, asked, labels, None, check)
    corpus = tasks.load_data(recipe, tasks.load_class_names(recipe))
    batch = pack(profiling.encode_first_batch(recipe, corpus))
    return profiling.make_profile_cases(recipe, asked, corpus.label_names, batch, check)


def _measured(cases: "Sequence[ProfileCase]") -> "list[ProfileResult]":
    from fedtune import profiling
    from fedtune.cli.profile_view import show_profile_progress

    rows = []
    with show_profile_progress(len(cases)) as (begin, end):
        for case in cases:
            begin(case.technique)
            rows.append(profiling.profile_in_subprocess(case))
            end(rows[-1])
    return rows


def _show(recipe: "Recipe", rows: "list[ProfileResult]", *, random: bool, output: Path | None, as_json: bool) -> None:
    """The table and the picture, or JSON; code 2 when nothing could run."""
    from fedtune.cli.profile_view import make_result_dicts, make_title, show_profile
    from fedtune.json_text import json_text
    from fedtune.paths import get_home_folder
    from fedtune.profiling import FailedProfile
    from fedtune.profiling.profile_chart import draw_profile

    heading = make_title(recipe, random)
    path = output or get_home_folder() / "pictures" / f"{recipe.name}-profile.png"
    if as_json:
        click.echo(json_text(make_result_dicts(rows)))
    else:
        show_profile(rows, heading)
    if output is not None or not as_json:
        draw_profile(rows, heading, path)
    if not as_json:
        click.echo(f"picture: {path}")
    if all(isinstance(row, FailedProfile) for row in rows):
        raise click.exceptions.Exit(2)
