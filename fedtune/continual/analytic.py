"""Analytic head: the classifier is computed from sums over features, and devices store nothing.

What: at the end of a task, each device sends the examples per class, their features' sums and the sum of x x^T over its
examples' features x. The server adds them to those of earlier tasks and computes the last layer in closed form. The
sums are those of one pass over all examples so far, so the head is the one of joint training on the same features, for
any order of tasks and any split over devices: old tasks lose only what more classes cost. Only the features of an
example may differ in their last bits between batches and processors.
Heads: ``slda`` is linear discriminant analysis with a shrunk shared covariance, ``ridge`` is least squares to one-hot
targets, ``ranpac`` is ridge on relu(x R), a random projection to ``width`` features. ``shrinkage`` and ``ridge`` are
relative to the mean variance and the mean square of the features. ``ridge: halves`` chooses the ridge with the least
squared error between the devices with even and with odd numbers, and then depends a little on the split.
Tuning: with ``tune: none`` nothing is trained. With ``first``, the techniques train in all rounds of the first task but
the last one, and the backbone is frozen from then on. With ``every``, they train in all rounds of each task but the
last one, and in that one devices send sums of all examples of tasks begun so far that they still hold, because the
features moved. Classes that no device could renew keep their rows of the head, and a warning names tasks and devices.
The digest of the backbone is stored beside the sums; an upload with another one is left out, with a warning.
Sends: C (d + 1) + d (d + 1) / 2 numbers per device and task: 0.3 MB for 384 features and 10 classes, 3.3 MB for 1280.
The server keeps the sums of two halves of the devices in double precision, 13 MB for 1280 features.
A device is counted once per task: what it gains until the task comes again does not change the head. Only the devices
of a task's last round send sums, so let all take part in it; give tasks in which nothing is tuned one round.
Privacy: sums are not anonymous. Of one example, its feature sum is the feature itself, so a device leaves out classes
with fewer than ``fewest`` examples. ``privacy`` neither clips nor noises sums, so the two exclude each other.
Use when: a pretrained backbone separates the classes. On Fashion-MNIST, two classes at a time on features of
EfficientNet-Lite0, slda and ridge end at 84.7 %, joint training by gradients with as many steps at 82.6 %, and a naive
stream at 19 % (benchmarks/continual_classes.py). There ranpac with 1000 features ends at 83.4 %.
Avoid when: the backbone must change for each task, or outputs must be calibrated: the scores of ridge are not log
probabilities, so its loss means little.
Source: Hayes and Kanan (arXiv 1909.01520) for slda, here with the exact pooled covariance; Fanì et al., Fed3R (arXiv
2406.01116), and He et al., AFL (arXiv 2405.16240), for ridge; McDonnell et al., RanPAC (arXiv 2307.02251), eq. 3-4 and
algorithm 1, whose ridge is absolute and chosen on the current task alone.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor, nn

from fedtune.continual._analytic_border import AnalyticHead, refit_head
from fedtune.continual._analytic_round import AnalyticRound, declare_sums
from fedtune.continual._head_features import find_head_layer, replace_layer
from fedtune.continual._method import Border, BorderResult, ContinualMethod, MethodRound, MethodSetup
from fedtune.continual._plan import Place, StreamPlan
from fedtune.continual._random_projection import ProjectedHead
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import Task, get_task
from fedtune.techniques import build_techniques
from fedtune.wire.client_update import TensorSpec

__all__ = ["Analytic"]

_MOST_BYTES = 64 << 20
"""The largest packed triangle that a device may be asked for, in single precision."""


@final
class Analytic(ContinualMethod):
    """Compute the head from sums that add up."""

    name: ClassVar[str] = "analytic"
    needs_common_border: ClassVar[bool] = True
    uploads_statistics: ClassVar[bool] = True
    head: Literal["slda", "ridge", "ranpac"] = "slda"
    shrinkage: float = Field(0.1, ge=0, le=1, description="share of the mean variance in the covariance of slda")
    ridge: float | Literal["halves"] = Field(0.1, description="penalty of ridge and ranpac, or halves to choose it")
    width: int = Field(1000, ge=1, description="projected features of ranpac")
    fewest: int = Field(8, ge=1, description="fewest examples of a class that a device sends sums of")
    tune: Literal["none", "first", "every"] = Field("none", description="tasks in which the techniques train")
    precision: Literal["float32", "float64"] = Field("float32", description="type of the sums that devices send")

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if classes, tasks, rounds or techniques do not fit."""
        assert recipe.stream is not None
        if isinstance(self.ridge, float) and self.ridge <= 0:
            raise RecipeError(f"analytic: ridge is {self.ridge:g}, but must be above 0; 0.1 is the default")
        if recipe.stream.setting == "task":
            raise RecipeError(
                "analytic: it computes one head for all classes, but setting: task has one per task; set setting: class"
            )
        if not get_task(recipe.task).has_classes:
            raise RecipeError(f"analytic: {recipe.task.name} has no classes; choose a classification task")
        self._check_tuning(recipe)

    def _check_tuning(self, recipe: Recipe) -> None:
        chosen = build_techniques(recipe.train.techniques)
        tuning = [one.name for one in chosen if one.selects_trainable_tensors and one.name != "head-only"]
        local = [one.name for one in chosen if one.has_local_tensors()]
        if local:
            raise RecipeError(
                f"analytic: {'+'.join(local)} keeps tensors on each device, so devices would sum different features; "
                "choose another technique"
            )
        if self.tune == "none" and tuning:
            raise RecipeError(
                f"analytic: {'+'.join(tuning)} trains below the head, which would make the sums of earlier tasks "
                "stale; set train.techniques to head-only, or tune: first or every"
            )
        if self.tune != "none" and not tuning:
            raise RecipeError("analytic: head-only tunes nothing below the head; add a technique, or set tune: none")
        for name, rounds in _list_tuned_tasks(recipe, self.tune):
            if rounds < 2:
                raise RecipeError(
                    f"analytic: {name} has one round, in which the sums are taken, so nothing is tuned; give it 2 "
                    "rounds or more, or set tune: none"
                )

    def trains(self, place: Place) -> bool:
        """Whether clients train in a round; sums are taken in the last one, in which nothing may move."""
        return not place.last and (self.tune == "every" or (self.tune == "first" and place.visit == 0))

    def rewrite_model(self, model: nn.Module, task: Task, recipe: Recipe) -> None:
        """Put the random projection before the head; ModelError if the sums would be too large."""
        name, layer = find_head_layer(model)
        width = self.width if self.head == "ranpac" else layer.in_features
        size = 4 * width * (width + 1) // 2
        if size > _MOST_BYTES:
            mend = "lower width" if self.head == "ranpac" else "choose a narrower model"
            raise ModelError(
                f"analytic: {width} features would make each device send {size / 1e6:.0f} MB per task, and at most "
                f"{_MOST_BYTES / 1e6:.0f} MB are allowed; {mend}"
            )
        if self.head == "slda" and layer.bias is None:
            raise ModelError(f"analytic: the head of {type(model).__name__} has no bias, which slda needs; use ridge")
        if self.head == "ranpac":
            replace_layer(model, name, ProjectedHead(recipe.seed, layer, width))

    def check_export(self) -> None:
        """Raise ModelError for a head that no plain model can contain."""
        if self.head == "ranpac":
            raise ModelError(
                "analytic: a plain model cannot contain the projection of ranpac; train with head: slda or ridge"
            )

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Take the sums in the last round of a visit."""
        return AnalyticRound(setup, fewest=self.fewest, renews=self.tune == "every", precision=self.precision)

    def declare_upload(self, model: nn.Module, recipe: Recipe, names: Sequence[str]) -> dict[str, TensorSpec]:
        """The sums, the digest of the backbone, and in a tuned stream the tasks that the sums include."""
        num_tasks = len(StreamPlan(recipe).task_names) if self.tune == "every" else None
        return declare_sums(find_head_layer(model)[1], self.precision, num_tasks)

    def after_task(self, border: Border) -> BorderResult:
        """Add the sums and compute the head."""
        settings = AnalyticHead("slda" if self.head == "slda" else "ridge", self.shrinkage, self.ridge)
        return refit_head(border, settings, renews=self.tune == "every")

    def list_sent_memory(self, memory: Mapping[str, Tensor], place: Place) -> list[str]:
        """Nothing: the head is part of the state."""
        return []


def _list_tuned_tasks(recipe: Recipe, tune: str) -> list[tuple[str, int]]:
    """Return the tasks with tuning and their rounds; a rule for tasks stands for all of them."""
    assert recipe.stream is not None
    if tune == "none":
        return []
    listed = recipe.stream.tasks
    if not isinstance(listed, list):
        return [("each task", listed.rounds)]
    return [(f"task {visit.name}", visit.rounds) for visit in (listed[:1] if tune == "first" else listed)]
