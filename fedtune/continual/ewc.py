"""EWC: a parameter moves the less, the more the predictions on earlier tasks depend on it.

What: the loss gains strength / 2 * sum_i F_i (theta_i - theta*_i)^2. theta* are the trained parameters at the last
border, and F is the diagonal Fisher information of all earlier tasks, F <- decay F + F_t. It is divided by its mean
over the parameters, so that a strength means the same for all models and at every quality of fit. A task that comes
again adds its F again, and so weighs more in the sum.
Exactness: every client sums F over single examples, and sends the sums with a count. The server adds them, so F is that
of all examples together, however they are divided among clients and batches. ``exact`` weights the squared gradients of
all classes by their probability, ``sampled`` draws one class, ``empirical`` takes the true label. The default is exact
for up to ten classes, sampled for more, and empirical for tasks without classes. Classes that are masked do not count.
Sends: up, as much as the trained tensors, once per task. Down, twice the trained tensors in every round after the first
task, since a device need not have taken part before. Nothing is kept on devices, but training holds twice the trained
tensors more in memory.
Use when: classes stay the same and some forgetting is seen. With a low-rank pair take ``lora: {trained_factors:
b-only}``: with A fixed, the penalty concerns the change of the weights themselves and not a factorisation.
Avoid when: new classes come. Their logits grow above the old ones without moving what EWC protects; use ``replay``. A
large strength freezes the model under Adam. Under plain SGD it diverges above 2 / (lr * max F).
Source: Kirkpatrick et al. (arXiv 1612.00796), equation 3. One anchor and decay: Schwarz et al., "Progress & Compress"
(arXiv 1805.06370), section 3.2. Kinds of F: van de Ven (arXiv 2502.11756). The division by the mean is fedtune's own.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.continual._anchor_checks import refuse_changing_tensors, refuse_moving_base, refuse_other_techniques
from fedtune.continual._fisher_sums import (
    FisherKind,
    LabelChoice,
    choose_fisher_kind,
    iter_single_examples,
    sum_fisher_information,
)
from fedtune.continual._method import (
    Border,
    BorderResult,
    ContinualMethod,
    MethodRound,
    MethodSetup,
    TaskUpload,
    Tensors,
)
from fedtune.continual._plan import Place
from fedtune.continual._quadratic_penalty import (
    average_sums,
    compute_quadratic_penalty,
    decay_fisher,
    scale_to_unit_mean,
)
from fedtune.continual._tensor_groups import join_groups, select_group
from fedtune.data.sampling import sample_rows
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.techniques import build_techniques
from fedtune.wire.client_update import TensorSpec

__all__ = ["Ewc"]

_COUNT = "count"


class Ewc(ContinualMethod):
    """A quadratic penalty around the last border, weighted by the Fisher information."""

    name: ClassVar[str] = "ewc"
    needs_common_border: ClassVar[bool] = True
    uploads_statistics: ClassVar[bool] = True

    strength: float = Field(100.0, ge=0, description="lambda; 0 measures but does not change training")
    decay: float = Field(1.0, gt=0, le=1, description="factor of the Fisher information of earlier tasks, per task")
    fisher: FisherKind | None = Field(None, description="default: by the number of classes")
    examples: int = Field(256, ge=1, description="most examples of a client that F is measured on")

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if no anchor fits what is trained."""
        refuse_moving_base(self.name, recipe)
        refuse_changing_tensors(self.name, recipe)
        refuse_other_techniques(self.name, recipe)
        task = get_task(recipe.task)
        if self.fisher in ("exact", "sampled") and not task.has_classes:
            raise RecipeError(f"stream.memory: ewc: {task.name} has no classes to draw; set fisher: empirical")
        if not task.can_split_batch:
            raise RecipeError(
                f"stream.memory: ewc: the loss of {task.name} compares the examples of a batch, so a single one has no "
                "Fisher information; take another method"
            )

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Hold the anchor and the Fisher information on the model's device."""
        return _EwcRound(self, setup)

    def declare_upload(self, model: nn.Module, recipe: Recipe, names: Sequence[str]) -> dict[str, TensorSpec]:
        """The sums of the trained parameters, and a count."""
        parameters = dict(model.named_parameters())
        found = {
            name: TensorSpec(tuple(parameters[name].shape), negative=False) for name in names if name in parameters
        }
        return {**found, _COUNT: TensorSpec((1,), negative=False)}

    def after_task(self, border: Border) -> BorderResult:
        """Add the task's Fisher information, and move the anchor. Without uploads, both stay."""
        fisher = scale_to_unit_mean(_average(border.uploads))
        if not fisher:
            return BorderResult(border.after, border.memory)
        joined = decay_fisher(select_group(border.memory, "fisher"), fisher, self.decay)
        anchor = {name: border.after[name].clone() for name in joined}
        memory = join_groups(fisher={name: one.float() for name, one in joined.items()}, anchor=anchor)
        return BorderResult(border.after, memory)

    def list_sent_memory(self, memory: Tensors, place: Place) -> list[str]:
        """Everything."""
        return list(memory)


class _EwcRound(MethodRound):
    """The penalty in one client's round, and the sums at its end."""

    def __init__(self, method: Ewc, setup: MethodSetup) -> None:
        parameters = dict(setup.model.named_parameters())
        self.method, self.setup = method, setup
        self.anchor, self.fisher = (
            {name: one.to(parameters[name].device) for name, one in select_group(setup.received, group).items()}
            for group in ("anchor", "fisher")
        )

    def compute_batch_term(self, rows: Sequence[int], batch: Tensors, logits: Tensor | None) -> Tensor | None:
        """Return the penalty; None in the first task."""
        if not self.method.strength:
            return None
        return compute_quadratic_penalty(self.setup.model, self.anchor, self.fisher, self.method.strength)

    def compute_upload(self) -> dict[str, Tensor]:
        """Return the Fisher sums over the client's examples, and their count."""
        setup, method = self.setup, self.method
        names = [name for name, parameter in setup.model.named_parameters() if parameter.requires_grad]
        rows = sample_rows(setup.rows, method.examples, setup.derive_seed("fisher-rows"))
        kind = method.fisher or choose_fisher_kind(setup.task, setup.classes or range(setup.num_labels))
        found = sum_fisher_information(
            setup.model,
            setup.task,
            build_techniques(setup.recipe.train.techniques),
            iter_single_examples(setup.examples, rows),
            names,
            LabelChoice(kind, setup.classes, setup.derive_seed("fisher")),
        )
        return {**found.sums, _COUNT: torch.tensor([float(found.num_examples)])}


def _average(uploads: Sequence[TaskUpload]) -> dict[str, Tensor]:
    sums = [{name: one for name, one in upload.tensors.items() if name != _COUNT} for upload in uploads]
    return average_sums(sums, [float(upload.tensors[_COUNT]) for upload in uploads])
