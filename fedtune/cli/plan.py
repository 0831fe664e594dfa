"""``fedtune plan``: choose settings for a memory budget without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.recipe.task_settings import list_task_names

if TYPE_CHECKING:
    from fedtune.plan.plan_report import PlanReport
    from fedtune.recipe.schema import Recipe

__all__ = ["plan"]


@click.command()
@click.option("--recipe", "path", metavar="RECIPE", type=click.Path(path_type=Path), help="The recipe to plan for.")
@click.option("--model", metavar="SOURCE", help="Instead of a recipe: a model with inputs of the largest size.")
@click.option("--task", type=click.Choice(list_task_names()), help="Task of --model.")
@click.option("--memory", metavar="SIZE", help="Budget of a training process, such as 512MB.  [default: the recipe's]")
@click.option("--length", metavar="N", help="Short for --set train.max_length=N: tokens per text.")
@click.option("--batch", metavar="N", help="Short for --set train.batch_size=N.")
@click.option("--image-size", metavar="N", help="Short for --set train.image_size=N: pixels.")
@click.option("--techniques", metavar="A,B,C+D", help="The lists to choose from.  [default: those of the task]")
@click.option(
    "--time-weight",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="1 takes the fastest plan that fits, 0 the one with least memory.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the recipe.")
@click.option("--write", type=click.Path(path_type=Path), help="Write a recipe with the recommended settings.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plot (.png or .svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def plan(path: Path | None, overrides: tuple[str, ...], write: Path | None, **options: Any) -> None:
    """Predict memory, time and sent bytes of settings, and recommend those for a memory budget.

    The product's own training step runs on tensors without data, so no weight is read and nothing is trained. The first
    plan of a model takes seconds, the next ones less than one.

    \b
    Example:
      fedtune plan --model sample:smollm2 --task text-generation --memory 512MB --length 512 --batch 16
      fedtune plan --recipe recipes/sentiment.yaml --write planned.yaml
    """
    from fedtune.plan.plan_report import PlanRequest, make_plan_report
    from fedtune.plan.runtimes import TRAINER_MODULES

    wanted = _read_recipe(path, overrides, options)
    if write is not None and write.exists():
        raise click.UsageError(f"{write} exists; name another file for --write")
    output = options["output"]
    if output is not None:
        from fedtune.profiling.profile_chart import parse_image_format

        parse_image_format(output)
    techniques = _parse_techniques(wanted, options["techniques"])
    budget, correction = _find_budget(wanted, path, options["memory"]), _learn_correction(wanted, path)
    request = PlanRequest(wanted, budget, options["time_weight"], techniques, TRAINER_MODULES, correction)
    report = make_plan_report(request)
    _show(wanted, report, output, as_json=options["as_json"])
    if report.recommended is None:
        click.echo(f"fedtune: {report.reason}", err=True)
        raise click.exceptions.Exit(2)
    if write is not None:
        _write(wanted, report, write)


def _read_recipe(path: Path | None, overrides: tuple[str, ...], options: dict[str, Any]) -> "Recipe":
    from fedtune.cli.profile import read_profiled_recipe

    short = {"batch_size": options["batch"], "max_length": options["length"], "image_size": options["image_size"]}
    added = (*overrides, *(f"train.{key}={value}" for key, value in short.items() if value is not None))
    return read_profiled_recipe(path, options["model"], options["task"], added)


def _find_budget(recipe: "Recipe", path: Path | None, memory: str | None) -> int:
    """Return the budget in bytes: the option's, or the smallest of the recipe's devices."""
    from fedtune.cli.option_parsers import parse_size

    if memory is not None:
        return parse_size(memory, "--memory")
    if path is None:
        raise click.UsageError("name a budget, such as --memory 512MB")
    return min(int(device.memory) for device in recipe.devices)


def _learn_correction(recipe: "Recipe", path: Path | None) -> float:
    """Return the factor that earlier runs taught about the recipe's device class with the least memory."""
    from fedtune.plan.corrections import learn_corrections
    from fedtune.tracking import Store

    if path is None:
        return 1.0
    smallest = min(recipe.devices, key=lambda device: int(device.memory))
    with Store.open() as store:
        return learn_corrections(store.predictions.list_errors()).get(smallest.name, 1.0)


def _parse_techniques(recipe: "Recipe", text: str | None) -> Any:
    if text is None:
        return None
    from fedtune.cli.profile import parse_technique_lists

    return parse_technique_lists(recipe, text)


def _show(recipe: "Recipe", report: "PlanReport", output: Path | None, *, as_json: bool) -> None:
    from fedtune.cli.plan_view import make_plan_title, show_plans

    if as_json:
        from fedtune.json_text import json_text

        click.echo(json_text(report.to_dict()))
    else:
        show_plans(report, make_plan_title(recipe))
    if output is not None:
        from fedtune.cli.plan_chart import draw_plans

        draw_plans(report, make_plan_title(recipe), output)
        if not as_json:
            click.echo(f"plot: {output}")


def _write(recipe: "Recipe", report: "PlanReport", path: Path) -> None:
    """Write the recipe with the recommended settings."""
    from fedtune.files import write_bytes_atomically
    from fedtune.plan.planned_recipe import format_planned_recipe

    assert report.recommended is not None
    write_bytes_atomically(path, format_planned_recipe(recipe, report.recommended, report.budget).encode())
    click.echo(f"recipe: {path}", err=True)
    if recipe.data.source == "random":
        click.echo("set data.source in it before you simulate", err=True)
