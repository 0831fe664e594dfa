"""``fedtune merge``: merge several fine-tunes of one base into one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.cli.option_parsers import DEVICES, Command, MergeOptions, parse_numbers, parse_step
from fedtune.recipe.task_settings import list_task_names

if TYPE_CHECKING:
    from fedtune.offline_merge.merge_stages import Stage

__all__ = ["merge"]


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, metavar="CONFIG.yaml | MODEL...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--method", metavar="NAME", help="Merge method; see: fedtune methods.  [default: linear]")
@click.option("--base-model", metavar="MODEL", help="The model that the others were fine-tuned from.")
@click.option("--weights", metavar="W,W,...", help="One number per model.  [default: 1 each]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter, or a key of CONFIG.yaml.")
@click.option("--seed", "--random-seed", type=click.IntRange(0), help="Seed of methods that draw random numbers.")
@click.option("--align", multiple=True, metavar="STEP", help="Align step, e.g. rebasin; repeatable.")
@click.option(
    "--relax", multiple=True, metavar="STEP", help="Relax step, e.g. aim, or 'aim: {omega: 0.3}'; repeatable."
)
@click.option("--renormalise", multiple=True, metavar="STEP", help="Renormalise step, e.g. repair; repeatable.")
@click.option("--tokenizer-source", metavar="RULE", help="Vocabulary of the result: union, base or one of the models.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Data type of the result.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["model", "adapter"]),
    default="model",
    help="Form of the result when adapters are merged.",
)
@click.option("--max-rank", type=click.IntRange(1), help="Largest rank of a merged adapter.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Fraction of the squared singular values that a merged adapter keeps.",
)
@click.option("--calibration-data", metavar="DATA", help="Data for steps that measure activations.")
@click.option("--eval-data", metavar="DATA", help="Data on which the inputs and the result are scored.")
@click.option(
    "--split", type=click.Choice(["all", "validation", "test"]), default="all", help="Split of --eval-data to score."
)
@click.option("--columns", metavar="KEY=NAME,...", help="Columns of the data, e.g. text=review,label=stars.")
@click.option(
    "--task",
    type=click.Choice(list_task_names()),
    help="Task of the models, for --calibration-data and --eval-data.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="cpu",
    show_default=True,
    help="Where models compute for --calibration-data and --eval-data.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of the result.")
@click.option("--report/--no-report", default=True, help="Compare the models first, which reads them once more.")
@click.option("--trust-base", is_flag=True, help="Merge even if deltas are about as large as the base model.")
@click.option("--dry-run", is_flag=True, help="Stop after the report; write nothing.")
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store, for run:ID.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def merge(sources: tuple[str, ...], output: Path | None, dry_run: bool, form: str, **more: Any) -> None:
    """Merge the models of CONFIG.yaml (mergekit's schema), or the given MODELs.

    A MODEL is a folder, a PEFT adapter, a .gguf file, BASE+ADAPTER, path:, gguf:, hub:, sample:, or run:ID[@ROUND]. To
    continue an interrupted merge, run the same command again.

    \b
    Example:
      fedtune merge merge.yaml -o merged
      fedtune merge ./code ./maths ./chat --base-model ./base --method ties --weights 0.5,0.3,0.2 \\
          --set density=0.2 -o merged
      fedtune merge run:latest run:film-1a2b --base-model run:latest@0 --method task-arithmetic --dry-run
    """
    if output is None and not dry_run:
        raise click.UsageError("name the output folder with -o, or use --dry-run")
    from fedtune.memory.heap import keep_freed_memory

    if more["device"] != "cpu":
        from fedtune.accelerator import require_device

        require_device(more["device"], "--device")
    keep_freed_memory()
    options = MergeOptions(sources, output, form, dry_run, **more)
    if form == "adapter":
        _merge_adapters(options)
    else:
        from fedtune.cli.merge_models import merge_stages

        merge_stages(options, _read_stages(options))


def _read_stages(options: MergeOptions) -> "list[Stage]":
    from fedtune.offline_merge import build_merge_config, read_merge_config
    from fedtune.offline_merge.merge_stages import Stage

    first = Path(options.sources[0])
    if first.suffix in (".yaml", ".yml"):
        changes = [options.method, options.base_model, options.weights, options.tokenizer_source, options.dtype]
        if len(options.sources) > 1 or any(changes) or options.align or options.relax or options.renormalise:
            raise click.UsageError(
                f"{first} contains the method and its settings; change them with --set, e.g. --set base_model=./base"
            )
        seeded = () if options.seed is None else (f"seed={options.seed}",)
        return read_merge_config(first, (*options.settings, *seeded))
    config, text = build_merge_config(
        options.sources,
        options.method or "linear",
        parse_numbers(options.weights),
        options.settings,
        base_model=options.base_model,
        tokenizer_source=options.tokenizer_source,
        dtype=options.dtype,
        seed=options.seed,
        **{key: [parse_step(text) for text in getattr(options, key)] for key in ("align", "relax", "renormalise")},
    )
    return [Stage(config, text, frozenset())]


def _merge_adapters(options: MergeOptions) -> None:
    """Merge adapters into one adapter. Only the method and its parameters can be chosen."""
    from fedtune.cli.merge_adapters import write_merged_adapter
    from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge, RankLimit
    from fedtune.offline_merge.merge_methods import build_merge_method

    *more, (config, _, _) = _read_stages(options)
    if more:
        raise click.UsageError(f"--format adapter makes one merge, but {options.sources[0]} contains {len(more) + 1}")
    if options.output is None or config.relax or config.align or config.renormalise or config.slices:
        raise click.UsageError("--format adapter writes at once (-o) and takes no align, relax, renormalise or slices")
    method = build_merge_method(config.merge_method)
    method.check_parameters(config.parameters, "parameters")
    for entry in config.model_entries:
        method.check_parameters(entry.parameters, f"the parameters of {entry.model}", own=True)
    layers = [(entry.parameters, config.parameters) for entry in config.model_entries]
    if any(isinstance(value, list) for layer in layers for settings in layer for value in settings.values()):
        raise click.UsageError(
            "--format adapter takes one value for all modules; lists and filters need --format model"
        )
    parts = [method.bind_model(layer, "", 0.0) for layer in layers]
    if method.is_passthrough or any(part.nothing for part in parts):
        raise click.UsageError("--format adapter uses every adapter; leave out an adapter that should not be merged")
    folders = [Path(entry.model.removeprefix("path:")).expanduser() for entry in config.model_entries]
    merge = AdapterMerge(
        step=method.build_step([config.parameters], "", 0.0, config.seed),
        weights=[part.weight for part in parts],
        overrides=[part.overrides for part in parts],
        limit=RankLimit(options.max_rank, options.energy),
    )
    write_merged_adapter(folders, options.output, merge, options.as_json)
