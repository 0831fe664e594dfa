"""``fedtune merge``: merge several fine-tunes of one base into one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.cli.option_parsers import Command, MergeOptions, numbers, unit
from fedtune.recipe.task_settings import list_task_names

if TYPE_CHECKING:
    from fedtune.offline_merge.merge_stages import Stage

__all__ = ["merge"]


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, metavar="CONFIG.yaml | MODEL...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--method", metavar="NAME", help="Merge method; see: fedtune methods.  [default: linear]")
@click.option("--base", metavar="MODEL", help="The model that the others were fine-tuned from.")
@click.option("--weights", metavar="W,W,...", help="One number per model.  [default: 1 each]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter, or a key of CONFIG.yaml.")
@click.option("--seed", "--random-seed", type=click.IntRange(0), help="Seed of methods that draw random numbers.")
@click.option("--align", multiple=True, metavar="STEP", help="e.g. rebasin")
@click.option("--relax", multiple=True, metavar="STEP", help="e.g. aim, or 'aim: {omega: 0.3}'")
@click.option("--renormalise", multiple=True, metavar="STEP", help="e.g. repair")
@click.option("--tokenizer", metavar="RULE", help="Vocabulary of the result: union, base or one of the models.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Data type of the result.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["model", "adapter"]),
    default="model",
    help="Form of the result when adapters are merged.",
)
@click.option("--rank", type=click.IntRange(1), help="Largest rank of a merged adapter.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), help="Fraction of the energy that an adapter keeps."
)
@click.option("--calibrate", metavar="DATA", help="Calibration data for steps that measure activations.")
@click.option("--evaluate", metavar="DATA", help="Data on which the inputs and the result are scored.")
@click.option(
    "--part", type=click.Choice(["all", "validation", "test"]), default="all", help="Split of --evaluate to score."
)
@click.option("--columns", metavar="KEY=NAME,...", help="Columns of the data, e.g. text=review,label=stars.")
@click.option(
    "--task", type=click.Choice(list_task_names()), help="Task of the models, for --calibrate and --evaluate."
)
@click.option("--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of the result.")
@click.option("--report/--no-report", default=True, help="Compare the models first, which reads them once more.")
@click.option("--trust-base", is_flag=True, help="Merge even if deltas are about as large as the base.")
@click.option("--dry-run", is_flag=True, help="Stop after the report; write nothing.")
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store, for run:ID.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def merge(sources: tuple[str, ...], output: Path | None, dry_run: bool, form: str, **options: Any) -> None:
    """Merge the models of CONFIG.yaml (mergekit's schema), or the given MODELs.

    A MODEL is a folder, a PEFT adapter, a .gguf file, BASE+ADAPTER, path:, gguf:, hub:, sample:, or run:ID[@ROUND]. To
    continue an interrupted merge, run the same command again.

    \b
    Example:
      fedtune merge merge.yaml -o merged
      fedtune merge ./code ./maths ./chat --base ./base --method ties --weights 0.5,0.3,0.2 \\
          --set density=0.2 -o merged
      fedtune merge run:latest run:film-1a2b --base run:latest@0 --method task-arithmetic --dry-run
    """
    if output is None and not dry_run:
        raise click.UsageError("name the output folder with -o, or use --dry-run")
    from fedtune.memory.heap import keep_freed_memory

    keep_freed_memory()
    asked = MergeOptions(sources, output, form, dry_run, **options)
    if form == "adapter":
        _merge_adapters(asked)
    else:
        from fedtune.cli.merge_models import merge_stages

        merge_stages(asked, _stages(asked))


def _stages(asked: MergeOptions) -> "list[Stage]":
    from fedtune.offline_merge import build_merge_config, read_merge_config
    from fedtune.offline_merge.merge_stages import Stage

    first = Path(asked.sources[0])
    if first.suffix in (".yaml", ".yml"):
        said = [asked.method, asked.base, asked.weights, asked.tokenizer, asked.dtype]
        if len(asked.sources) > 1 or any(said) or asked.align or asked.relax or asked.renormalise:
            raise click.UsageError(f"{first} says how to merge; change it with --set, e.g. --set base_model=./base")
        seeded = () if asked.seed is None else (f"seed={asked.seed}",)
        return read_merge_config(first, (*asked.settings, *seeded))
    config, text = build_merge_config(
        asked.sources,
        asked.method or "linear",
        numbers(asked.weights),
        asked.settings,
        base_model=asked.base,
        tokenizer_source=asked.tokenizer,
        dtype=asked.dtype,
        seed=asked.seed,
        **{key: [unit(text) for text in getattr(asked, key)] for key in ("align", "relax", "renormalise")},
    )
    return [Stage(config, text, frozenset())]


def _merge_adapters(asked: MergeOptions) -> None:
    """Adapters of one base into one adapter, which nothing but the method and its parameters shape."""
    from fedtune.cli.merge_adapters import write_merged_adapter
    from fedtune.offline_merge.merge_methods import build_merge_method

    *more, (config, _, _) = _stages(asked)
    if more:
        raise click.UsageError(f"--as adapter makes one merge, but {asked.sources[0]} contains {len(more) + 1}")
    if asked.output is None or config.relax or config.align or config.renormalise or config.slices:
        raise click.UsageError("--as adapter writes at once (-o) and takes no align, relax, renormalise or slices")
    chosen = build_merge_method(config.merge_method)
    chosen.check_parameters(config.parameters, "parameters")
    for entry in config.model_entries:
        chosen.check_parameters(entry.parameters, f"the parameters of {entry.model}", own=True)
    layers = [(entry.parameters, config.parameters) for entry in config.model_entries]
    if any(isinstance(value, list) for layer in layers for settings in layer for value in settings.values()):
        raise click.UsageError("--as adapter takes one value for all modules; lists and filters need --as model")
    parts = [chosen.bind_model(layer, "", 0.0) for layer in layers]
    if chosen.is_passthrough or any(part.nothing for part in parts):
        raise click.UsageError("--as adapter needs something of every adapter; copy one, or leave one out, by hand")
    folders = [Path(entry.model.removeprefix("path:")).expanduser() for entry in config.model_entries]
    step = chosen.build_step([config.parameters], "", 0.0, config.seed)
    weights, knobs = [part.weight for part in parts], [part.knobs for part in parts]
    write_merged_adapter(folders, asked.output, step, weights, knobs, asked.rank, asked.energy, asked.as_json)
