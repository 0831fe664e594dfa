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
    from fedtune.cli.cached_export import load_checkpoint_target
    from fedtune.export import describe_missing_tensors, export_model

    recipe, state, run, at = load_checkpoint_target(target, round_number, store)
    card = _make_card(recipe.model_dump_json(indent=2), run, at) + _describe_privacy(run, at, store)
    form = export_model(recipe, state, output, form, card)  # type: ignore[arg-type]
    if as_json:
        click.echo(json_text({"path": str(output.absolute()), "format": form, "run": run, "round": at}))
    else:
        click.echo(f"{output}: {form} of run {run}, round {at}")
        click.echo(describe_missing_tensors(recipe), nl=False)


def _describe_privacy(run: str, round_number: int, store: str | None) -> str:
    """Describe the differential privacy of the weights, if the run has any."""
    from fedtune.cli.privacy_text import make_privacy_paragraph
    from fedtune.tracking import Store

    with Store.open(store) as opened:
        return make_privacy_paragraph(
            opened.run(run), [record for record in opened.rounds(run) if record.number <= round_number]
        )


def _make_card(recipe: str, run: str, round_number: int) -> str:
    return f"# {run}\n\nMade by fedtune, round {round_number}, from this recipe:\n\n```json\n{recipe}\n```\n"
