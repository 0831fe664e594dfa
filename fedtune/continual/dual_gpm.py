"""DualGPM: the server remembers the subspace of earlier tasks' inputs, and designs the pairs of ``inf-lora`` off it.

What: clients send the Gram matrix sum x x^T of the inputs of each layer with a pair. Grams of clients add up to that of
all examples. After a task, M takes in the strongest directions of its inputs until it holds a share of their energy
tr(G). That share rises from ``first_share`` to ``last_share`` over the tasks. A of the next task is then drawn off M,
and after that task's first round half of its rows become the strongest directions of the new inputs off M.
Sends: up, the upper triangle of each Gram in the first and last round of a task. Layers that read the same input send
one. Down, nothing: A is part of the state. The server keeps M, at most the square of each layer's inputs.
Use when: ``inf-lora`` trains a stream; it needs this and refuses without it.
Avoid when: ``privacy`` is wanted: Grams are neither clipped nor noised.
Source: Liang, Li, "Adaptive Plasticity Improvement for Continual Learning" (DualGPM, CVPR 2023), and InfLoRA (arXiv
2404.00228), section 3.3. Deviations: energy is that of the inputs, as in Saha et al. (GPM, arXiv 2103.09762), equation
5; the code of InfLoRA takes singular values of the Gram, which are its squares. M is kept as it is, also above half of
the space, where DualGPM keeps the complement: both are the same subspace.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.continual._layer_grams import group_layers_by_input, measure_grams, pack_triangle, unpack_triangle
from fedtune.continual._method import (
    Border,
    BorderResult,
    ContinualMethod,
    MethodRound,
    MethodSetup,
    TaskUpload,
    Tensors,
)
from fedtune.continual._quadratic_penalty import sum_in_order
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.techniques import build_techniques
from fedtune.techniques.low_rank._input_subspace import (
    design_projection,
    draw_projection,
    extend_subspace,
    schedule_energy_share,
)
from fedtune.techniques.low_rank._task_pairs import get_pair_name
from fedtune.techniques.low_rank.inf_lora import InfLora
from fedtune.wire.client_update import TensorSpec

__all__ = ["DualGpm"]


class DualGpm(ContinualMethod):
    """The subspace of earlier tasks' inputs, off which pairs are designed."""

    name: ClassVar[str] = "dual-gpm"
    needs_common_border: ClassVar[bool] = True
    uploads_statistics: ClassVar[bool] = True
    uploads_at_start: ClassVar[bool] = True

    first_share: float = Field(0.95, gt=0, le=1, description="energy of its inputs that M holds after the first task")
    last_share: float = Field(1.0, gt=0, le=1, description="the same towards the last task")
    examples: int = Field(128, ge=1, description="most examples of a client that inputs are measured on")

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError without pairs to design."""
        if not any(unit.name == "inf-lora" for unit in recipe.train.techniques):
            raise RecipeError("stream.memory: dual-gpm designs the pairs of inf-lora; add it to train.techniques")
        if any(device.techniques is not None for device in recipe.devices):
            raise RecipeError(
                "devices: a class has techniques of its own, but dual-gpm designs the pairs of one model; let all "
                "train alike"
            )

    def begin_round(self, setup: MethodSetup) -> MethodRound:
        """Measure inputs at the end of the round."""
        return _GramRound(self, setup)

    def declare_upload(self, model: nn.Module, recipe: Recipe, names: Sequence[str]) -> dict[str, TensorSpec]:
        """A triangle for each distinct input."""
        widths = {name: _get_width(model, name) for name in group_layers_by_input(model)}
        return {name: TensorSpec((width * (width + 1) // 2,)) for name, width in widths.items()}

    def after_first_round(self, border: Border) -> Tensors:
        """Write the designed rows of the task's A, once. Without uploads they stay zero."""
        technique = _find_technique(border.recipe)
        random_rows = technique.count_random_rows(border.task)
        state = dict(border.after)
        if _is_first_visit(technique, border.visit) and border.uploads:
            for name, factor, gram in _iter_factors(border, border.task):
                a = state[factor].clone()
                taken = torch.cat([_get_subspace(border.memory, name, gram), _span(a[:random_rows])], dim=1)
                a[random_rows:] = design_projection(gram, taken, technique.rank - random_rows)
                state[factor] = a
        return state

    def after_task(self, border: Border) -> BorderResult:
        """Extend M by the task's inputs, and draw A of the next task off it."""
        technique = _find_technique(border.recipe)
        tasks = 1 + max(task for task, _ in technique.visits)
        share = schedule_energy_share(self.first_share, self.last_share, border.task, tasks)
        memory, state = dict(border.memory), dict(border.after)
        for name, _, gram in _iter_factors(border, border.task) if border.uploads else ():
            memory[name] = extend_subspace(gram, _get_subspace(border.memory, name, gram), share).float().contiguous()
        following = border.visit + 1
        if following < len(technique.visits) and _is_first_visit(technique, following):
            state |= _draw_factors(border, technique, memory, technique.visits[following][0])
        return BorderResult(state, memory)


class _GramRound(MethodRound):
    """The measurement at the end of a client's round."""

    def __init__(self, method: DualGpm, setup: MethodSetup) -> None:
        self.method, self.setup = method, setup

    def compute_upload(self) -> dict[str, Tensor]:
        """Return the Grams of the client's examples."""
        setup, recipe = self.setup, self.setup.recipe
        rows = sample_rows(setup.rows, self.method.examples, setup.derive_seed("grams"))
        batches = iter_inputs(setup.examples, rows, recipe.evaluation.batch_size)
        chosen = build_techniques(recipe.train.techniques)
        grams = measure_grams(setup.model, chosen, group_layers_by_input(setup.model), batches)
        return {name: pack_triangle(gram) for name, gram in grams.items()}


def _find_technique(recipe: Recipe) -> InfLora:
    return next(one for one in build_techniques(recipe.train.techniques) if isinstance(one, InfLora))


def _is_first_visit(technique: InfLora, visit: int) -> bool:
    """Whether a task's pair is new: that of a task that comes again is not designed anew."""
    task, _ = technique.visits[visit]
    return task not in [one for one, _ in technique.visits[:visit]]


def _iter_factors(border: Border, task: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the input's name, the name of A in the state, and the Gram of all clients, for each layer."""
    for name, layers in group_layers_by_input(border.model).items():
        gram = unpack_triangle(_sum(border.uploads, name), _get_width(border.model, name))
        for layer in layers:
            yield name, _name_factor(layer, task), gram


def _draw_factors(border: Border, technique: InfLora, memory: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """Return A of a task whose round has not begun, by name: random rows off M, and zeros to be designed."""
    found = {}
    for name, layers in group_layers_by_input(border.model).items():
        for layer in layers:
            factor = _name_factor(layer, task)
            subspace = _get_subspace(memory, name, border.after[factor].T)
            seed = derive_seed(border.recipe.seed, "dual-gpm", factor)
            rows = technique.count_random_rows(task)
            found[factor] = torch.zeros_like(border.after[factor])
            found[factor][:rows] = draw_projection(subspace, rows, seed)
    return found


def _sum(uploads: Sequence[TaskUpload], name: str) -> Tensor:
    return sum_in_order([upload.tensors[name] for upload in uploads])


def _get_subspace(memory: Tensors, name: str, like: Tensor) -> Tensor:
    """Return M [in, k]; without any column before the first border. ``like`` has as many rows as a layer has inputs."""
    return memory[name].double() if name in memory else torch.zeros(len(like), 0, dtype=torch.float64)


def _span(rows: Tensor) -> Tensor:
    """Return an orthonormal basis [in, k] of independent rows [k, in]; rows of zeros are left out."""
    basis: Tensor = torch.linalg.qr(rows[rows.any(1)].double().T).Q
    return basis


def _name_factor(layer: str, task: int) -> str:
    return f"{layer}.lora_A.{get_pair_name(task)}.weight"


def _get_width(model: nn.Module, layer: str) -> int:
    return int(model.get_parameter(_name_factor(layer, 0)).shape[1])
