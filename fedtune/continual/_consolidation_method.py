"""The merge steps of ``stream.consolidate`` as a continual method: clients measure, the server merges at a border."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtune import merging
from fedtune.continual._border_checks import refuse_masks, refuse_moving_pairs, refuse_one_factor, refuse_uneven_uploads
from fedtune.continual._border_sums import add_sums, average_sums, declare_sums, pack_sums
from fedtune.continual._consolidation import BorderEvidence, build_consolidation, consolidate_task
from fedtune.continual._fisher_sums import (
    LabelChoice,
    choose_fisher_kind,
    iter_single_examples,
    sum_fisher_information,
)
from fedtune.continual._head_rows import keep_new_rows
from fedtune.continual._method import Border, BorderResult, ContinualMethod, MethodRound, MethodSetup, Tensors
from fedtune.continual._tensor_groups import join_groups, select_group
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.errors import RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe, Unit
from fedtune.tasks import get_task
from fedtune.techniques import build_techniques
from fedtune.wire.client_update import TensorSpec

__all__ = ["Consolidation"]

_FISHER_EXAMPLES = 256
_SUMS = "sums"


class Consolidation(ContinualMethod):
    """Takes back a part of what a task changed. Rows of the head for new classes keep all of their change.

    The first task changes nothing that was learned before, so it is left as it is. The sums of a task that comes again
    count once.
    """

    name: ClassVar[str] = "consolidate"
    needs_common_border: ClassVar[bool] = True
    consolidates: ClassVar[bool] = True
    steps: tuple[Unit, ...]

    def build_pipeline(self) -> MergePipeline:
        """The steps as a merge."""
        return build_consolidation(self.steps)

    @property
    def _measures_inputs(self) -> bool:
        return merging.build_calibration_request(self.build_pipeline().relax) is not None

    @property
    def _measures_fisher(self) -> bool:
        return self.build_pipeline().combine.name == "fisher"

    @property
    def label(self) -> str:
        """The first of the steps."""
        return self.steps[0].name

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if the steps do not fit each other or what is trained."""
        refuse_masks(self.label, recipe)
        refuse_moving_pairs(self.label, recipe)
        if self._measures_inputs:
            refuse_one_factor("aim", "scales columns of weights", recipe)
        if not (self._measures_inputs or self._measures_fisher):
            return
        refuse_uneven_uploads(self.label, recipe)
        if recipe.privacy is not None:
            raise RecipeError(
                f"stream.consolidate: {self.label} sends statistics that privacy neither clips nor noises; choose "
                "shrink with a number, or average"
            )
        if self._measures_fisher and not get_task(recipe.task).can_split_batch:
            raise RecipeError(
                f"stream.consolidate: the loss of {get_task(recipe.task).name} compares the examples of a batch, so a "
                "single one has no Fisher information; choose another step than fisher"
            )

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Measure after training, in the last round of a task."""
        return _ConsolidationRound(self, setup)

    def declare_upload(self, model: nn.Module, recipe: Recipe, names: Sequence[str]) -> dict[str, TensorSpec]:
        """The sums that the steps need, of the trained tensors."""
        if self._measures_inputs:
            return declare_sums(merging.find_input_channels(model, set(names)))
        if not self._measures_fisher:
            return {}
        parameters = dict(model.named_parameters())
        return {name: TensorSpec(tuple(parameters[name].shape), negative=False) for name in names if name in parameters}

    def after_task(self, border: Border) -> BorderResult:
        """Consolidate the state by the sums of earlier tasks, then add those of this task."""
        newest = add_sums(upload.tensors for upload in border.uploads)
        earlier = select_group(border.memory, _SUMS)
        memory = self._remember(border, earlier, newest)
        if border.visit == 0:
            return BorderResult(border.after, memory)
        evidence = self._collect_evidence(border, earlier, newest)
        state = consolidate_task(self.build_pipeline(), border.before, border.after, evidence)
        return BorderResult(keep_new_rows(border, state), memory)

    def _remember(self, border: Border, earlier: Tensors, newest: Tensors) -> Tensors:
        counted = border.memory.get("counted", torch.zeros(0, dtype=torch.int64))
        if not newest or border.task in counted.tolist():
            return border.memory
        counted = torch.cat([counted, torch.tensor([border.task])])
        return {**join_groups(**{_SUMS: add_sums([earlier, newest])}), "counted": counted}

    def _collect_evidence(self, border: Border, earlier: Tensors, newest: Tensors) -> BorderEvidence:
        if self._measures_inputs:
            return BorderEvidence(average_sums(border.model, earlier, list(border.after)))
        return BorderEvidence({}, earlier, newest) if self._measures_fisher else BorderEvidence()

    def measure_sums(self, setup: MethodSetup) -> dict[str, Tensor]:
        """Return the tensors of ``declare_upload``, measured on a client's examples."""
        names = [name for name, parameter in setup.model.named_parameters() if parameter.requires_grad]
        if self._measures_inputs:
            return self._measure_inputs(setup, names)
        return _measure_fisher(setup, names) if self._measures_fisher else {}

    def _measure_inputs(self, setup: MethodSetup, names: Sequence[str]) -> dict[str, Tensor]:
        request = merging.build_calibration_request(self.build_pipeline().relax)
        assert request is not None
        rows = sample_rows(setup.rows, request.calibration_examples, setup.derive_seed("activity"))
        inputs = iter_inputs(setup.examples, rows, setup.recipe.evaluation.batch_size)
        places = merging.find_input_channels(setup.model, set(names))
        return pack_sums(
            merging.sum_activations(setup.model, places, inputs, build_techniques(setup.recipe.train.techniques))
        )


class _ConsolidationRound(MethodRound):
    """The measurement at the end of one client's task."""

    def __init__(self, method: Consolidation, setup: MethodSetup) -> None:
        self.method, self.setup = method, setup

    def compute_upload(self) -> dict[str, Tensor]:
        """Return the sums over the client's examples of the task."""
        return self.method.measure_sums(self.setup)


def _measure_fisher(setup: MethodSetup, names: Sequence[str]) -> dict[str, Tensor]:
    rows = sample_rows(setup.rows, _FISHER_EXAMPLES, setup.derive_seed("fisher-rows"))
    kind = choose_fisher_kind(setup.task, setup.classes or range(setup.num_labels))
    return sum_fisher_information(
        setup.model,
        setup.task,
        build_techniques(setup.recipe.train.techniques),
        iter_single_examples(setup.examples, rows),
        names,
        LabelChoice(kind, setup.classes, setup.derive_seed("fisher")),
    ).sums
