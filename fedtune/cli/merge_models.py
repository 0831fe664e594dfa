"""``fedtune merge``: compare, merge, write and score models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedtune.cli.option_parsers import MergeOptions, columns, size

if TYPE_CHECKING:
    from fedtune.offline_merge import MergeConfig, ModelComparison, PreparedMerge
    from fedtune.offline_merge.merge_stages import Stage
    from fedtune.offline_merge.model_card import ModelMetrics

__all__ = ["merge_stages"]


def merge_stages(asked: MergeOptions, stages: "Sequence[Stage]") -> None:
    """Run the merges of a file in order. Intermediate results go into a folder beside the output."""
    if len(stages) == 1:
        _merge_one(asked, stages[0].config, stages[0].text)
        return
    if asked.output is None or asked.dry_run:
        raise click.UsageError(f"--dry-run reports one merge, but {asked.sources[0]} contains {len(stages)}; use -o")
    import shutil

    from fedtune.errors import FedtuneError
    from fedtune.offline_merge.merge_stages import check, replace_stage_names

    check(stages)
    beside = asked.output.absolute().with_name(f".{asked.output.name}.stages")
    made: dict[str, Path] = {}
    try:
        for stage in stages[:-1]:
            made[str(stage.config.name)] = _stage(asked, replace_stage_names(stage.config, made), stage.text, beside)
        _merge_one(asked, replace_stage_names(stages[-1].config, made), stages[-1].text)
    except FedtuneError:  # an interruption leaves what is made for the same command to go on with
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(beside)


def _stage(asked: MergeOptions, config: "MergeConfig", text: str, beside: Path) -> Path:
    """Return the folder of an intermediate merge. It is reused if the same merge was made before."""
    from fedtune.offline_merge import prepare_merge

    key = prepare_merge(config, asked.export).compute_resume_key()
    folder = beside / f"{config.name}-{key[:12]}"
    if not folder.exists():
        click.echo(f"{config.name}:", err=asked.as_json)
        _merge_one(asked._replace(output=folder, evaluate=None), config, text, told=not asked.as_json)
    return folder


def _merge_one(asked: MergeOptions, config: "MergeConfig", text: str, *, told: bool = True) -> None:
    from fedtune.cli.merge_view import show_byte_progress
    from fedtune.offline_merge import compare, prepare_merge

    prepared = prepare_merge(config, asked.export)
    shards = prepared.plan_shards(size(asked.shard_size))
    if asked.output is not None:
        from fedtune.offline_merge.output_folder import check_output_space

        check_output_space(asked.output, shards)
    found = None
    if asked.report or asked.dry_run:
        with show_byte_progress("comparing", prepared.output_bytes) as progress:
            found = compare(prepared, progress, trust_base=asked.trust_base)
    if found is not None and not asked.as_json:
        from fedtune.cli.merge_view import show_comparison

        show_comparison(found)
    scores, warned = ({}, list(prepared.warnings)) if asked.dry_run else _write(asked, prepared, text, found)
    if told:
        _tell(asked, prepared, found, scores, warned)


def _write(
    asked: MergeOptions, prepared: "PreparedMerge", text: str, found: "ModelComparison | None"
) -> "tuple[dict[str, Any], list[str]]":
    """Write the result and its card; return the scores, if requested, and the warnings."""
    from fedtune import offline_merge
    from fedtune.cli.merge_view import show_byte_progress
    from fedtune.files import write_bytes_atomically
    from fedtune.offline_merge.merge_warnings import RESULT_NAME, warn_of_better_inputs, warn_of_dominant_channels
    from fedtune.offline_merge.model_card import CardContents, build_model_card, hash_model_files
    from fedtune.offline_merge.write_model import CARD

    assert asked.output is not None
    named = columns(asked.columns)
    scores: dict[str, Any] = {}
    for name in prepared.models.by_name if asked.evaluate else ():
        scores[name] = _score(asked, name, named)
    evidence = _evidence(asked, prepared, named)
    warned = [*prepared.warnings, *warn_of_dominant_channels(prepared.steps.relax, evidence.activation_statistics)]
    card = CardContents(asked.output.name, prepared, text, hash_model_files(prepared), found, scores, warned)
    with show_byte_progress("merging", prepared.output_bytes) as progress:
        offline_merge.write_merged_model(
            prepared,
            asked.output,
            build_model_card(card),
            shard_size=size(asked.shard_size),
            evidence=evidence,
            progress=progress,
        )
    if asked.evaluate:
        scores[RESULT_NAME] = _score(asked, f"path:{asked.output}", named)
        warned += warn_of_better_inputs(scores)
        told = build_model_card(replace(card, scores=scores, warnings=warned))
        write_bytes_atomically(asked.output / CARD, told.encode())
    return scores, warned


def _evidence(asked: MergeOptions, prepared: "PreparedMerge", columns: dict[str, str]) -> Any:
    if not prepared.steps.needs:
        from fedtune.merging import MergeContext

        return MergeContext()
    from fedtune.offline_merge.evaluate_models import collect_merge_context
    from fedtune.tasks import get_task

    task = None if asked.task is None else get_task(asked.task)
    column = None if task is None else columns.get(task.input_column)
    return collect_merge_context(prepared, task, asked.calibrate, column, asked.export)


def _score(asked: MergeOptions, source: str, columns: dict[str, str]) -> Any:
    from fedtune.offline_merge.evaluate_models import evaluate_folder, materialise_model
    from fedtune.tasks import get_task

    if asked.task is None:
        raise click.UsageError("--evaluate needs --task, e.g. --task text-classification")
    assert asked.evaluate is not None
    with materialise_model(source, asked.export) as folder:
        return evaluate_folder(folder, get_task(asked.task), asked.evaluate, columns, asked.part)


def _tell(
    asked: MergeOptions,
    prepared: "PreparedMerge",
    found: "ModelComparison | None",
    scores: "ModelMetrics",
    warned: Sequence[str],
) -> None:
    for sentence in warned:
        click.echo(f"warning: {sentence}", err=True)
    if asked.as_json:
        from fedtune.json_text import json_text

        document = {
            "method": prepared.steps.combine.name,
            "path": None if asked.dry_run else str(Path(str(asked.output)).absolute()),
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
    if not asked.dry_run:
        click.echo(f"{asked.output}: {len(prepared.output_tensors)} tensors, {prepared.output_bytes / 1e6:.1f} MB")
