"""``fedtune export``: write the result of a run for transformers or PEFT."""

from pathlib import Path

import click

from fedtune.json_text import json_text

__all__ = ["export"]


@click.command()
@click.argument("target")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option("--round", "round_number", type=click.IntRange(0), help="Round to export.  [default: the last]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["adapter", "model"]),
    help="Form of the export.  [default: adapter if possible]",
)
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def export(
    target: str, output: Path, round_number: int | None, form: str | None, store: str | None, as_json: bool
) -> None:
    """Write the model of TARGET as a PEFT adapter or a whole safetensors model.

    TARGET is a run, the beginning of its id, latest, or a checkpoint file of a run.

    \b
    Example:
      fedtune export latest -o my-model
      fedtune export latest -o my-model --format model
    """
    from fedtune.export import describe_missing_tensors
    from fedtune.library.exported_run import export_run

    written = export_run(target, output, round_number, form, store)  # type: ignore[arg-type]
    if as_json:
        path = str(output.absolute())
        click.echo(json_text({"path": path, "format": written.form, "run": written.run, "round": written.round}))
    else:
        click.echo(f"{output}: {written.form} of run {written.run}, round {written.round}")
        click.echo(describe_missing_tensors(written.recipe), nl=False)
