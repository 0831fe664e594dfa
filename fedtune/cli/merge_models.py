"""``fedtune merge``: compare, merge, write and score models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.cli.option_parsers import MergeOptions, parse_columns, parse_size

if TYPE_CHECKING:
    from fedtune.offline_merge import MergeConfig, ModelComparison, PreparedMerge
    from fedtune.offline_merge.merge_stages import Stage
    from fedtune.offline_merge.model_card import ModelMetrics

__all__ = ["merge_stages"]


def merge_stages(options: MergeOptions, stages: "Sequence[Stage]") -> None:
    """Run the merges of a file in order. Intermediate results go into a folder beside the output."""
    if len(stages) == 1:
        _merge_one(options, stages[0].config, stages[0].text)
        return
    if options.output is None or options.dry_run:
        raise click.UsageError(f"--dry-run reports one merge, but {options.sources[0]} contains {len(stages)}; use -o")
    import shutil

    from fedtune.errors import FedtuneError
    from fedtune.offline_merge.merge_stages import check_stages, replace_stage_names

    check_stages(stages)
    beside = options.output.absolute().with_name(f".{options.output.name}.stages")
    made: dict[str, Path] = {}
    try:
        for stage in stages[:-1]:
            made[str(stage.config.name)] = _merge_intermediate(
                options, replace_stage_names(stage.config, made), stage.text, beside
            )
        _merge_one(options, replace_stage_names(stages[-1].config, made), stages[-1].text)
    except FedtuneError:  # after an interruption the intermediate results stay, and the same command continues
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(beside)


def _merge_intermediate(options: MergeOptions, config: "MergeConfig", text: str, beside: Path) -> Path:
    """Return the folder of an intermediate merge. It is reused if the same merge was made before."""
    from fedtune.offline_merge import prepare_merge

    key = prepare_merge(config, options.export_run).compute_resume_key()
    folder = beside / f"{config.name}-{key[:12]}"
    if not folder.exists():
        click.echo(f"{config.name}:", err=options.as_json)
        _merge_one(options._replace(output=folder, eval_data=None), config, text, show=not options.as_json)
    return folder


def _merge_one(options: MergeOptions, config: "MergeConfig", text: str, *, show: bool = True) -> None:
    from fedtune.cli.merge_view import show_byte_progress
    from fedtune.offline_merge import compare_models, prepare_merge

    prepared = prepare_merge(config, options.export_run)
    shards = prepared.plan_shards(parse_size(options.max_shard_size))
    if options.output is not None:
        from fedtune.offline_merge.output_folder import check_output_space

        check_output_space(options.output, shards)
    found = None
    if options.report or options.dry_run:
        with show_byte_progress("comparing", prepared.output_bytes) as progress:
            found = compare_models(prepared, progress, trust_base=options.trust_base)
    if found is not None and not options.as_json:
        from fedtune.cli.merge_view import show_comparison

        show_comparison(found)
    scores, warned = ({}, list(prepared.warnings)) if options.dry_run else _write(options, prepared, text, found)
    if show:
        _show_result(options, prepared, found, scores, warned)


def _write(
    options: MergeOptions, prepared: "PreparedMerge", text: str, found: "ModelComparison | None"
) -> "tuple[dict[str, Any], list[str]]":
    """Write the result and its card; return the scores, if requested, and the warnings."""
    from fedtune import offline_merge
    from fedtune.cli.merge_view import show_byte_progress
    from fedtune.files import write_bytes_atomically
    from fedtune.offline_merge.merge_warnings import RESULT_NAME, warn_of_better_inputs, warn_of_dominant_channels
    from fedtune.offline_merge.model_card import CardContents, build_model_card, hash_model_files
    from fedtune.offline_merge.write_model import CARD
    from fedtune.tasks import get_task

    assert options.output is not None
    named = parse_columns(options.columns)
    scores: dict[str, Any] = {}
    for name in prepared.models.by_name if options.eval_data else ():
        scores[name] = _score(options, name, named)
    context = _build_merge_context(options, prepared, named)
    warned = [*prepared.warnings, *warn_of_dominant_channels(prepared.steps.relax, context.activation_statistics)]
    card = CardContents(options.output.name, prepared, text, hash_model_files(prepared), found, scores, warned)
    with show_byte_progress("merging", prepared.output_bytes) as progress:
        offline_merge.write_merged_model(
            prepared,
            options.output,
            build_model_card(card),
            shard_size=parse_size(options.max_shard_size),
            context=context,
            progress=progress,
        )
    if options.eval_data:
        scores[RESULT_NAME] = _score(options, f"path:{options.output}", named)
        warned += warn_of_better_inputs(scores, get_task(options.task or "").main_metric)
        text_with_scores = build_model_card(replace(card, scores=scores, warnings=warned))
        write_bytes_atomically(options.output / CARD, text_with_scores.encode())
    return scores, warned


def _build_merge_context(options: MergeOptions, prepared: "PreparedMerge", columns: dict[str, str]) -> Any:
    if not prepared.steps.needs:
        from fedtune.merging import MergeContext

        return MergeContext()
    from fedtune.accelerator import choose_device
    from fedtune.offline_merge.evaluate_models import collect_merge_context
    from fedtune.tasks import get_task

    task = None if options.task is None else get_task(options.task)
    column = None if task is None else columns.get(task.input_column)
    return collect_merge_context(
        prepared, task, options.calibration_data, column, options.export_run, choose_device(options.device)
    )


def _score(options: MergeOptions, source: str, columns: dict[str, str]) -> Any:
    from fedtune.accelerator import choose_device
    from fedtune.offline_merge.evaluate_models import evaluate_folder, materialise_model
    from fedtune.tasks import get_task

    if options.task is None:
        raise click.UsageError("--eval-data needs --task, e.g. --task text-classification")
    assert options.eval_data is not None
    with materialise_model(source, options.export_run) as folder:
        device = choose_device(options.device)
        return evaluate_folder(folder, get_task(options.task), options.eval_data, columns, options.split, device)


def _show_result(
    options: MergeOptions,
    prepared: "PreparedMerge",
    found: "ModelComparison | None",
    scores: "ModelMetrics",
    warned: Sequence[str],
) -> None:
    for sentence in warned:
        click.echo(f"warning: {sentence}", err=True)
    if options.as_json:
        from fedtune.json_text import json_text

        document = {
            "method": prepared.steps.combine.name,
            "path": None if options.dry_run else str(Path(str(options.output)).absolute()),
            "tensors": len(prepared.output_tensors),
            "bytes": prepared.output_bytes,
            "report": None if found is None else found.to_dict(),
            "scores": {name: [one._asdict() for one in figures] for name, figures in scores.items()},
            "warnings": list(warned),
        }
        click.echo(json_text(document))
        return
    from fedtune.cli.merge_view import show_metrics

    if scores:
        show_metrics(scores)
    if not options.dry_run:
        click.echo(f"{options.output}: {len(prepared.output_tensors)} tensors, {prepared.output_bytes / 1e6:.1f} MB")
