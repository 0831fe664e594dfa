"""``fedtune evaluate``: score the model of a run on any data source."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedtune.cli.option_parsers import DEVICES, parse_columns
from fedtune.json_text import json_text

if TYPE_CHECKING:
    from fedtune.training import Metric

__all__ = ["evaluate"]


@click.command()
@click.argument("target")
@click.option(
    "--round", "round_number", type=click.IntRange(0), help="Round to score; 0 is before training.  [default: the last]"
)
@click.option("--data", "source", metavar="SOURCE", help="Another data source; all its examples are scored.")
@click.option("--columns", metavar="KEY=NAME,...", help="Columns of --data, e.g. text=review,label=stars.")
@click.option(
    "--split", type=click.Choice(["validation", "test"]), help="Split of the run's own data.  [default: validation]"
)
@click.option("--device", type=click.Choice(DEVICES), help="Where the model computes.  [default: train.device]")
@click.option(
    "--lm-eval",
    "harness_task",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run a task of lm-evaluation-harness from its YAML file, on local data.",
)
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def evaluate(
    target: str,
    round_number: int | None,
    source: str | None,
    columns: str | None,
    split: str | None,
    device: str | None,
    harness_task: Path | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Score TARGET on a split of its own data, or on another data source.

    TARGET is a run, the beginning of its id, latest, or a checkpoint file of a run. With --lm-eval it may also be a
    folder with a language model or a PEFT adapter.

    \b
    Example:
      fedtune evaluate latest --split test
      fedtune evaluate latest --data csv:reviews.csv --columns text=review,label=verdict
      fedtune evaluate latest --lm-eval capitals.yaml
    """
    from fedtune.accelerator import require_device
    from fedtune.errors import ModelError
    from fedtune.library.cached_export import load_checkpoint_target
    from fedtune.server.scoring import write_samples
    from fedtune.tracking.sample_text import format_samples
    from fedtune.training import evaluate_model, get_run_context, set_model_state

    _refuse_conflicts(source, columns, split, device, harness_task)
    if harness_task is not None:
        _run_harness(target, harness_task, round_number, store, as_json)
        return
    recipe, state, run, at = load_checkpoint_target(target, round_number, store)
    if device is not None:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": device})})
    require_device(recipe.train.device, "train.device" if device is None else "--device")
    context = get_run_context(recipe.model_dump_json())
    if context.local_tensors:
        raise ModelError(
            f"run {run} keeps some tensors of its model on the devices; see the split local: fedtune runs show {run}"
        )
    examples = (
        getattr(context, split or "validation")
        if source is None
        else context.encode_source(source, parse_columns(columns))
    )
    scored = source or split or "validation"
    set_model_state(context.model, state)
    scores = evaluate_model(context.evaluated_model, examples)
    samples = write_samples(context, state)
    if as_json:
        figures = [found._asdict() for found in scores]
        written = [asdict(one) for one in samples]
        at_round = {"run": run, "round": at, "data": scored, "device_type": context.device.type}
        click.echo(json_text({**at_round, "metrics": figures, "samples": written}))
    else:
        _show_scores(scores, f"{run}, round {at}, on {scored} ({len(examples)} examples)")
        for line in format_samples(samples):
            click.echo(line)


def _refuse_conflicts(
    source: str | None, columns: str | None, split: str | None, device: str | None, harness_task: Path | None
) -> None:
    if source is not None and split is not None:
        raise click.UsageError(
            "--split selects a split of the run's own data, but all of --data is scored; remove one of them"
        )
    if source is None and columns is not None:
        raise click.UsageError("--columns names the columns of --data; add it, e.g. --data csv:reviews.csv")
    if harness_task is not None and (source is not None or split is not None):
        raise click.UsageError("--lm-eval reads the data that its file names; remove --data and --split")
    if harness_task is not None and device is not None:
        raise click.UsageError("--lm-eval computes on the CPU; remove --device")


def _run_harness(target: str, task: Path, round_number: int | None, store: str | None, as_json: bool) -> None:
    from fedtune.library.harness_evaluation import run_harness_task

    found = run_harness_task(target, task, round_number, store)
    if as_json:
        click.echo(json_text({"target": found.target, "lm_eval": found.metrics}))
        return
    click.echo(f"{found.target}, by lm-eval")
    for name, metrics in found.metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                click.echo(f"  {name}  {metric.partition(',')[0]}  {value:.4f}")


def _show_scores(scores: "list[Metric]", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    names = sorted({found.name for found in scores})
    console = Console(markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    table = Table(box=None, header_style="bold")
    for heading in ("domain", *names):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain in dict.fromkeys(found.domain for found in scores):
        figures = {found.name: f"{found.value:.4f}" for found in scores if found.domain == domain}
        table.add_row(domain, *(figures.get(name, "") for name in names))
    console.print(table)
