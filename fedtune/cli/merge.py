"""``fedtune merge``: several fine-tunes of one base made into one model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from fedtune.cli.merge_options import columns, numbers, size, unit

if TYPE_CHECKING:
    from fedtune.fusion import Comparison, Merge, MergeConfig
    from fedtune.fusion.card import Scores
    from fedtune.recipe import Task

__all__ = ["merge"]

_TASKS = ["causal-language-modelling", "sequence-classification", "image-classification"]


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="CONFIG.yaml | MODEL...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--method", metavar="NAME", help="Merge method; see: fedtune methods.  [default: linear]")
@click.option("--base", metavar="MODEL", help="What the models were fine-tuned from.")
@click.option("--weights", metavar="W,W,...", help="One number per model.  [default: 1 each]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter, or a key of CONFIG.yaml.")
@click.option("--align", multiple=True, metavar="STEP", help="e.g. rebasin")
@click.option("--relax", multiple=True, metavar="STEP", help="e.g. aim, or 'aim: {omega: 0.3}'")
@click.option("--renormalise", multiple=True, metavar="STEP", help="e.g. repair")
@click.option("--tokenizer", metavar="RULE", help="Whose tokens: union, base or one of the models.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the result.")
@click.option("--as", "form", type=click.Choice(["model", "adapter"]), default="model", help="What adapters become.")
@click.option("--rank", type=click.IntRange(1), help="Largest rank of a merged adapter.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of it that an adapter keeps.")
@click.option("--calibrate", metavar="DATA", help="Examples for steps that watch the model at work.")
@click.option("--evaluate", metavar="DATA", help="Examples on which inputs and result are scored.")
@click.option("--part", type=click.Choice(["all", "validation", "test"]), default="all", help="Of DATA to evaluate.")
@click.option("--columns", metavar="KEY=NAME,...", help="Their columns, e.g. text=review,label=stars.")
@click.option("--task", type=click.Choice(_TASKS), help="What the models do; for --calibrate and --evaluate.")
@click.option("--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of the result.")
@click.option("--report/--no-report", default=True, help="Compare the models first; reads them once more.")
@click.option("--trust-base", is_flag=True, help="Merge though deltas are about as large as the base.")
@click.option("--dry-run", is_flag=True, help="Stop after the report; write nothing.")
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store, for run:ID.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def merge(sources: tuple[str, ...], output: Path | None, dry_run: bool, form: str, **options: Any) -> None:
    """Merge models as CONFIG.yaml says (mergekit's schema), or MODELs by the options.

    A MODEL is a folder, a PEFT adapter, a .gguf file, BASE+ADAPTER, path:, gguf:, hub:, sample:, or run:ID[@ROUND]. An
    interrupted merge goes on when the same command is given again.

    \b
    Example:
      fedtune merge merge.yaml -o merged
      fedtune merge ./code ./maths ./chat --base ./base --method ties --weights 0.5,0.3,0.2 \\
          --set density=0.2 -o merged
      fedtune merge run:latest run:film-1a2b --base run:latest@0 --method task-arithmetic --dry-run
    """
    if output is None and not dry_run:
        raise click.UsageError("name the folder to make with -o, or look only with --dry-run")
    from fedtune.memory.heap import keep_freed_memory

    keep_freed_memory()
    asked = _Asked(sources, output, form, dry_run, **options)
    if form == "adapter":
        _merge_adapters(asked)
    else:
        _merge_models(asked)


class _Asked(NamedTuple):
    """The command line."""

    sources: tuple[str, ...]
    output: Path | None
    form: str
    dry_run: bool
    method: str | None
    base: str | None
    weights: str | None
    settings: tuple[str, ...]
    align: tuple[str, ...]
    relax: tuple[str, ...]
    renormalise: tuple[str, ...]
    tokenizer: str | None
    dtype: str | None
    rank: int | None
    energy: float | None
    calibrate: str | None
    evaluate: str | None
    part: str
    columns: str | None
    task: "Task | None"
    shard_size: str
    report: bool
    trust_base: bool
    store: str | None
    as_json: bool

    def export(self, reference: str) -> Path:
        """What a run learned, kept in the cache as a whole model."""
        from fedtune.cli.exported import exported

        return exported(reference, self.store)


def _merge_models(asked: _Asked) -> None:
    from fedtune.cli.merge_view import showing
    from fedtune.fusion import compare, prepare

    config, text = _config(asked)
    prepared = prepare(config, asked.export)
    shards = prepared.shards(size(asked.shard_size))
    if asked.output is not None:
        from fedtune.fusion.output import check_free

        check_free(asked.output, shards)
    found = None
    if asked.report or asked.dry_run:
        with showing("comparing", prepared.bytes) as progress:
            found = compare(prepared, progress, trust_base=asked.trust_base)
    if found is not None and not asked.as_json:
        from fedtune.cli.merge_view import show_comparison

        show_comparison(found)
    scores, warned = ({}, []) if asked.dry_run else _write(asked, prepared, text, found)
    _tell(asked, prepared, found, scores, warned)


def _write(
    asked: _Asked, prepared: "Merge", text: str, found: "Comparison | None"
) -> "tuple[dict[str, Any], list[str]]":
    """Write the result and its card; returns the scores, if any were asked for, and what speaks against the result."""
    from fedtune import fusion
    from fedtune.cli.merge_view import showing
    from fedtune.files import write
    from fedtune.fusion.card import card, hashes
    from fedtune.fusion.result import CARD
    from fedtune.fusion.warnings import MERGED, faint_channels, outscored

    assert asked.output is not None
    named = columns(asked.columns)
    scores: dict[str, Any] = {}
    for name in prepared.models.by_name if asked.evaluate else ():
        scores[name] = _score(asked, name, named)
    evidence = _evidence(asked, prepared, named)
    warned = faint_channels(prepared.steps.relax, evidence.activity)
    read = hashes(prepared)
    with showing("merging", prepared.bytes) as progress:
        fusion.merge(
            prepared,
            asked.output,
            card(asked.output.name, prepared, text, read, found, scores, warned),
            shard_size=size(asked.shard_size),
            evidence=evidence,
            progress=progress,
        )
    if asked.evaluate:
        scores[MERGED] = _score(asked, f"path:{asked.output}", named)
        warned += outscored(scores)
        told = card(asked.output.name, prepared, text, read, found, scores, warned)
        write(asked.output / CARD, told.encode())
    return scores, warned


def _evidence(asked: _Asked, prepared: "Merge", columns: dict[str, str]) -> Any:
    if not prepared.steps.needs:
        from fedtune.merging import Evidence

        return Evidence()
    from fedtune.fusion.score import gather

    kind = "image" if asked.task == "image-classification" else "text"
    return gather(prepared, asked.task, asked.calibrate, columns.get(kind), asked.export)


def _score(asked: _Asked, source: str, columns: dict[str, str]) -> Any:
    from fedtune.fusion.score import score_folder, whole_folder

    if asked.task is None:
        raise click.UsageError("--evaluate needs --task, e.g. --task sequence-classification")
    assert asked.evaluate is not None
    with whole_folder(source, asked.export) as folder:
        return score_folder(folder, asked.task, asked.evaluate, columns, asked.part)


def _tell(
    asked: _Asked, prepared: "Merge", found: "Comparison | None", scores: "Scores", warned: Sequence[str]
) -> None:
    for sentence in warned:
        click.echo(f"warning: {sentence}", err=True)
    if asked.as_json:
        import json

        document = {
            "method": prepared.steps.combine.name,
            "path": None if asked.dry_run else str(Path(str(asked.output)).absolute()),
            "tensors": len(prepared.targets),
            "bytes": prepared.bytes,
            "report": None if found is None else found.document(),
            "scores": {name: [one._asdict() for one in figures] for name, figures in scores.items()},
            "warnings": list(warned),
        }
        click.echo(json.dumps(document, indent=2))
        return
    from fedtune.cli.merge_view import show_scores

    if scores:
        show_scores(scores)
    if not asked.dry_run:
        click.echo(f"{asked.output}: {len(prepared.targets)} tensors, {prepared.bytes / 1e6:.1f} MB")


def _config(asked: _Asked) -> "tuple[MergeConfig, str]":
    from fedtune.fusion import quick, read

    first = Path(asked.sources[0])
    if first.suffix in (".yaml", ".yml"):
        said = [asked.method, asked.base, asked.weights, asked.tokenizer, asked.dtype]
        if len(asked.sources) > 1 or any(said) or asked.align or asked.relax or asked.renormalise:
            raise click.UsageError(f"{first} says how to merge; change it with --set, e.g. --set base_model=./base")
        return read(first, asked.settings)
    return quick(
        asked.sources,
        asked.method or "linear",
        numbers(asked.weights),
        asked.settings,
        base_model=asked.base,
        tokenizer_source=asked.tokenizer,
        dtype=asked.dtype,
        **{key: [unit(text) for text in getattr(asked, key)] for key in ("align", "relax", "renormalise")},
    )


def _merge_adapters(asked: _Asked) -> None:
    """Adapters of one base into one adapter, which nothing but the method and its parameters shape."""
    from fedtune.cli.merge_adapters import merge_adapters
    from fedtune.fusion.methods import method

    config, _ = _config(asked)
    if asked.output is None or config.relax or config.align or config.renormalise or config.slices:
        raise click.UsageError("--as adapter writes at once (-o) and takes no align, relax, renormalise or slices")
    chosen = method(config.merge_method)
    chosen.check(config.parameters, "parameters")
    layers = [(entry.parameters, config.parameters) for entry in config.entries]
    weights = [chosen.weight(layer, "", 0.0) for layer in layers]
    folders = [Path(entry.model.removeprefix("path:")).expanduser() for entry in config.entries]
    step = chosen.step([config.parameters], "", 0.0, config.seed)
    merge_adapters(folders, asked.output, step, weights, asked.rank, asked.energy, asked.as_json)
