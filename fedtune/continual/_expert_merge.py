"""The merge of task vectors: which steps can take them."""

from collections.abc import Sequence

from fedtune import merging
from fedtune.continual._plan import StreamPlan
from fedtune.errors import RecipeError
from fedtune.merging import CombineStep, MergePipeline
from fedtune.merging.combine._gram_regression import GramRegressionStep
from fedtune.merging.combine.fisher import Fisher
from fedtune.recipe.schema import Recipe, Unit

__all__ = ["build_expert_merge", "check_task_count"]


def build_expert_merge(units: Sequence[Unit]) -> MergePipeline:
    """Return the merge; RecipeError for steps that need more than the vectors."""
    pipeline = merging.build_pipeline(list(units))
    combine = pipeline.combine
    measured = isinstance(combine, GramRegressionStep | Fisher) or bool(pipeline.needs)
    whole = pipeline.align or pipeline.renormalise or pipeline.server_optimiser
    measured = measured or combine.reference == "root data"
    if measured or whole or combine.update_kind != "tensors":
        names = ", ".join(step.name for step in pipeline.steps)
        raise RecipeError(
            f"experts: {names}: the server has task vectors and nothing that was measured on examples, and no pairs; "
            "choose steps such as mean, ties, magmax or opcm"
        )
    return pipeline


def check_task_count(combine: CombineStep, recipe: Recipe) -> None:
    """Raise RecipeError if the step cannot merge two experts, or as many as there are tasks."""
    if combine.required_models > 2:
        raise RecipeError(
            f"experts: {combine.name} needs {combine.required_models} models, but after the second task there are two; "
            "choose another step"
        )
    if recipe.stream is None or not isinstance(recipe.stream.tasks, list) or combine.max_models is None:
        return
    tasks = len(StreamPlan(recipe).task_names)
    if tasks > combine.max_models:
        raise RecipeError(
            f"experts: {combine.name} takes {combine.max_models} models, but the stream has {tasks} tasks; choose mean"
        )
