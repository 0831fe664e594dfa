"""Average: the model after t tasks is the mean of the models at their ends.

What: at a border, theta = theta*_(t-1) + (theta_t - theta*_(t-1)) / t, where theta*_(t-1) is the state at the begin of
the task. ``share`` is another factor for every task. Rows of a classifier's head for new classes keep all of their
change.
Memory: nothing, on the server or on devices, and nothing is sent.
Use when: you need the baseline of every other merge at a border, or tasks repeat the same domains.
Avoid when: what came last matters most: the t-th task keeps one t-th of its change. It is a smaller step and no more:
less is forgotten because less is learned.
Source: the running mean of weights, as stochastic weight averaging (Izmailov et al., arXiv 1803.05407) takes it over
points of one run, here over tasks. A ``share`` is interpolation in weights (Wortsman et al., WiSE-FT, arXiv
2109.01903).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedtune.continual._border_checks import refuse_masks, refuse_moving_pairs
from fedtune.continual._consolidation import BorderEvidence, build_consolidation, consolidate_task
from fedtune.continual._head_rows import keep_new_rows
from fedtune.continual._method import Border, BorderResult, ContinualMethod
from fedtune.recipe.schema import Recipe, Unit

__all__ = ["Average"]


class Average(ContinualMethod):
    """Averages the ends of tasks."""

    name: ClassVar[str] = "average"
    needs_common_border: ClassVar[bool] = True
    consolidates: ClassVar[bool] = True
    share: Annotated[float, Field(ge=0, le=1)] | Literal["tasks"] = Field(
        "tasks", description="how much of its change a task keeps; tasks: one over the number of tasks so far"
    )

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if what is trained has no mean."""
        refuse_masks(self.name, recipe)
        refuse_moving_pairs(self.name, recipe)

    def after_task(self, border: Border) -> BorderResult:
        """Return the mean; the first task keeps its change."""
        if border.visit == 0:
            return BorderResult(border.after, border.memory)
        share = 1 / (border.visit + 1) if self.share == "tasks" else self.share
        pipeline = build_consolidation([Unit(name="shrink", settings={"factor": share})])
        state = consolidate_task(pipeline, border.before, border.after, BorderEvidence())
        return BorderResult(keep_new_rows(border, state), border.memory)
