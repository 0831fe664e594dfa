"""The result of a run, written for transformers or PEFT, or loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedtune.library.cached_export import load_checkpoint_target
from fedtune.library.privacy_text import make_privacy_paragraph
from fedtune.tracking import Store

if TYPE_CHECKING:
    from torch import nn

    from fedtune.export import Format
    from fedtune.recipe.schema import Recipe

__all__ = ["ExportedRun", "export_run", "load_run_model"]


class ExportedRun(NamedTuple):
    """What was written: the form, the run and its round, and the recipe."""

    form: "Format"
    run: str
    round: int
    recipe: "Recipe"


def export_run(
    target: str, output: Path, round_number: int | None, form: "Format | None", store: str | None
) -> ExportedRun:
    """Write the model of a run or a checkpoint to a new folder, with a card."""
    from fedtune.export import export_model

    recipe, state, run, at = load_checkpoint_target(target, round_number, store)
    card = _make_card(recipe.model_dump_json(indent=2), run, at) + _describe_privacy(run, at, store)
    return ExportedRun(export_model(recipe, state, output, form, card), run, at, recipe)


def load_run_model(target: str, round_number: int | None, store: str | None) -> "nn.Module":
    """The model of a run in plain layers, in evaluation mode."""
    from fedtune import tasks, techniques
    from fedtune.training import prepare_model, set_model_state

    recipe, state, _, _ = load_checkpoint_target(target, round_number, store)
    labels = tasks.load_data(recipe, tasks.load_class_names(recipe)).label_names
    model, chosen, _ = prepare_model(recipe, labels, device="cpu")
    set_model_state(model, state)
    techniques.merge_into_weights(chosen, model)
    return model.eval()


def _describe_privacy(run: str, round_number: int, store: str | None) -> str:
    """Describe the differential privacy of the weights, if the run has any."""
    with Store.open(store) as opened:
        return make_privacy_paragraph(
            opened.run(run), [record for record in opened.rounds(run) if record.number <= round_number]
        )


def _make_card(recipe: str, run: str, round_number: int) -> str:
    return f"# {run}\n\nMade by fedtune, round {round_number}, from this recipe:\n\n```json\n{recipe}\n```\n"
