"""``fedtune profile``: measure the cost of a training step with each technique."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.cli.option_parsers import DEVICES
from fedtune.recipe.task_settings import list_task_names

if TYPE_CHECKING:
    from fedtune.profiling import ProfileCase, ProfileResult
    from fedtune.recipe.schema import Recipe, Unit

__all__ = ["parse_technique_lists", "profile", "read_profiled_recipe"]


@click.command()
@click.argument("path", metavar="[RECIPE]", type=click.Path(path_type=Path), required=False)
@click.option("--model", metavar="SOURCE", help="Instead of a recipe: a model with random inputs.")
@click.option("--task", type=click.Choice(list_task_names()), help="Task of --model.")
@click.option("--techniques", metavar="A,B,C+D", help="Techniques to measure, or all.  [default: the recipe's]")
@click.option("--batch-size", metavar="N", help="Short for --set train.batch_size=N.")
@click.option("--max-length", metavar="N", help="Short for --set train.max_length=N: tokens per text.")
@click.option("--image-size", metavar="N", help="Short for --set train.image_size=N: pixels.")
@click.option("--device", type=click.Choice(DEVICES), help="Short for --set train.device=...")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("--check-gradients", is_flag=True, help="Compare gradients with those of stored activations.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plot (.png or .svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def profile(
    path: Path | None,
    model: str | None,
    task: str | None,
    techniques: str | None,
    batch_size: str | None,
    max_length: str | None,
    image_size: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    check_gradients: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure activation memory, time and sent bytes of a training step with each technique.

    full, lora, lora+gradient-checkpointing and qlora are measured for comparison. The cases run one at a time, each in
    its own process.

    Techniques may have settings, in YAML: --techniques "lora: {rank: 4}, [qlora: {rank: 4}, gradient-checkpointing]".

    \b
    Example:
      fedtune profile recipes/sentiment.yaml --techniques bias,full+gradient-checkpointing
      fedtune profile --model sample:minilm --task text-classification --check-gradients
    """
    short = {"batch_size": batch_size, "max_length": max_length, "image_size": image_size, "device": device}
    added = (*overrides, *(f"train.{key}={value}" for key, value in short.items() if value is not None))
    wanted = read_profiled_recipe(path, model, task, added)
    if wanted.train.device != "cpu":
        from fedtune.accelerator import require_device

        require_device(wanted.train.device, "train.device" if device is None else "--device")
    if output is not None:
        from fedtune.profiling.profile_chart import parse_image_format

        parse_image_format(output)
    found = _make_cases(
        wanted,
        _parse_techniques(wanted, techniques, given=path is not None),
        random=path is None,
        check=check_gradients,
    )
    rows = _measure_cases(found)
    from fedtune import tasks

    _show(tasks.resolve_reader(wanted), rows, random=path is None, output=output, as_json=as_json)


def read_profiled_recipe(path: Path | None, model: str | None, task: str | None, overrides: Sequence[str]) -> "Recipe":
    """Read the recipe, or make one for the model. The data of the latter is never read."""
    from fedtune.library.cached_export import export_base_run
    from fedtune.recipe.yaml_file import parse_recipe, read_recipe

    if path is not None and model is None and task is None:
        return export_base_run(read_recipe(path, overrides), None)
    if path is not None or model is None or task is None:
        raise click.UsageError("name either a RECIPE or --model with --task, e.g. recipes/sentiment.yaml")
    import yaml

    train = {"local_steps": 1, "batch_size": 16, "max_length": 128}
    made_up = {
        "version": 2,
        "name": _make_recipe_name(model),
        "task": task,
        "model": {"source": model},
        "data": {"source": "random"},
    }
    text = yaml.safe_dump({**made_up, "devices": [{"count": 1}], "train": train, "federation": {"rounds": 1}})
    return export_base_run(parse_recipe(text, "--model", overrides), None)


def _make_recipe_name(model: str) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "-", Path(model.rpartition(":")[2]).stem.lower()).strip("-")[:64] or "model"


def _parse_techniques(recipe: "Recipe", text: str | None, given: bool) -> "list[list[Unit]]":
    """Parse YAML such as ``a, b+c, [lora: {rank: 4}, d]``, or ``all``. The default is the recipe's own techniques."""
    if text is None:
        return [recipe.train.techniques] if given else []
    if text == "all":
        from fedtune.profiling import list_profiled_techniques

        return list_profiled_techniques()
    return parse_technique_lists(recipe, text)


def parse_technique_lists(recipe: "Recipe", text: str) -> "list[list[Unit]]":
    """Parse YAML such as ``a, b+c, [lora: {rank: 4}, d]``; RecipeError if a list is invalid."""
    from fedtune.errors import RecipeError
    from fedtune.recipe.yaml_text import YamlError, load

    try:
        items = load(f"[{text}]")
    except YamlError as error:
        raise RecipeError(f"--techniques {text}: write it as a,b,c+d") from error
    return [_parse_units(recipe, item) for item in items]


def _parse_units(recipe: "Recipe", item: Any) -> "list[Unit]":
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


def _make_cases(recipe: "Recipe", techniques: "list[list[Unit]]", *, random: bool, check: bool) -> "list[ProfileCase]":
    """Return the cases. Every error is raised here, before the first case is measured."""
    from fedtune import profiling, tasks
    from fedtune.models.sources import locate_model
    from fedtune.wire.client_update import pack

    profiling.make_profile_cases(recipe, techniques, (), None)
    locate_model(recipe.model)
    if random:
        labels = ("no", "yes") if tasks.get_task(recipe.task).has_new_head else ()
        return profiling.make_profile_cases(recipe, techniques, labels, None, check)
    corpus = tasks.load_data(recipe, tasks.load_class_names(recipe))
    batch = pack(profiling.encode_first_batch(recipe, corpus))
    return profiling.make_profile_cases(recipe, techniques, corpus.label_names, batch, check)


def _measure_cases(cases: "Sequence[ProfileCase]") -> "list[ProfileResult]":
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
    """Print the table and draw the plot, or print JSON. Exit code 2 if no case could run."""
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
        click.echo(f"plot: {path}")
    if all(isinstance(row, FailedProfile) for row in rows):
        raise click.exceptions.Exit(2)
