"""The hooks of techniques in a training loop that is not fedtune's.

Forward hooks on the model call ``begin_step``, add the loss terms of techniques to the loss, and keep the statistics of
batch norms. Step hooks on the optimiser call ``before_optimiser_step`` and begin the next round.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fedtune import techniques
from fedtune.accelerator import move_tensors
from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques import ExtraPayload, StepInfo, Technique
from fedtune.training.model_state import get_model_state, set_model_state
from fedtune.training.train_mode import freeze_batch_norm_statistics

__all__ = ["StepHooks"]


_TRL_HEAD = "fused_lm_head"
"""With this argument Trainers of TRL get what they compute their own loss from."""


class StepHooks:
    """The place in the training, and the hooks that are called there. Rounds count from 1, steps from 0."""

    def __init__(self, chosen: Sequence[Technique], task: Task, shared_names: Sequence[str]) -> None:
        self._techniques, self._task, self._shared_names = tuple(chosen), task, list(shared_names)
        self.round_number, self.step = 1, 0
        self.total_steps: int | None = None
        self.steps_per_round: int | None = None
        self.base_lr = 0.0
        self.is_attached, self.is_measuring = False, False
        self._inputs: dict[str, Any] = {}
        self._terms: list[Tensor] = []
        self._block = ExitStack()

    @property
    def progress(self) -> float:
        """The share 0..1 of all steps that is completed; 0 if their number is unknown."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Register the forward hooks."""
        return [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward, with_kwargs=True, always_call=True),
        ]

    def _begin_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = _name_inputs(model, args, kwargs)
        if not model.training:
            techniques.begin_step(self._techniques, model, inputs, 1.0)
            return
        self._require_optimiser()
        self._require_own_loss(inputs, outside=bool(kwargs.get(_TRL_HEAD)))
        freeze_batch_norm_statistics(model)
        self._inputs = {**inputs}
        techniques.begin_step(self._techniques, model, inputs, self.progress)
        self._block.close()
        self._terms = self._block.enter_context(techniques.collect_loss_terms())

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        terms, self._terms = self._terms, []
        self._block.close()
        if not terms or output is None or not torch.is_grad_enabled():
            return None
        if kwargs.get(_TRL_HEAD) or getattr(output, "loss", None) is None:
            raise ModelError(
                f"a technique adds a term to the loss, but the loss is computed outside {type(model).__name__}; pass "
                "labels to the model, or use the Trainer of transformers"
            )
        share = self._share_of_batch(kwargs)
        scaled = [term if share == 1 else term * share for term in terms]
        return _replace_loss(output, torch.stack([output.loss, *scaled]).sum())

    def _share_of_batch(self, kwargs: Mapping[str, Any]) -> float:
        """The share of a micro-batch in the predictions of its batch, which a Trainer that accumulates tells."""
        total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        return 1.0 if total is None or labels is None else self._task.count_predictions(labels) / int(total)

    def _require_optimiser(self) -> None:
        changing = [one.name for one in self._techniques if _changes_gradients(one)]
        if changing and not self.is_attached and not self.is_measuring and torch.is_grad_enabled():
            raise ModelError(
                f"{changing[0]} changes the gradients before each optimiser step; call attach(optimiser, "
                "steps_per_round=...) first, or give the Trainer make_callback(steps_per_round=...)"
            )

    def _require_own_loss(self, inputs: Mapping[str, Any], *, outside: bool) -> None:
        """ModelError if the loss is computed outside the model, and a technique works inside the model's own.

        If the model gets no labels, that matters only for techniques whose loss is another one.
        """
        unlabelled = "labels" not in inputs and torch.is_grad_enabled()
        for one in self._techniques:
            if one.replaces_loss and (outside or (unlabelled and not one.has_exact_gradients)):
                raise ModelError(
                    f"{one.name} changes how the model computes its loss, but this loss is computed outside the model; "
                    f"leave {one.name} out, or pass labels to the model and train with its loss"
                )

    def check_rounds(self, steps_per_round: int | None) -> None:
        """ModelError if a technique acts between rounds whose length nobody said, or that several processes count."""
        if steps_per_round is not None and steps_per_round < 1:
            raise ModelError(f"steps_per_round is {steps_per_round}, but must be at least 1")
        acting = [one.name for one in self._techniques if one.changes_per_round()]
        if acting and steps_per_round is None:
            raise ModelError(
                f"{acting[0]} trains something else in each round; say how many steps a round has, e.g. "
                "steps_per_round=100"
            )
        if acting and _count_processes() > 1:
            raise ModelError(
                f"{acting[0]} trains something else in each round, which {_count_processes()} processes that train one "
                "model do not agree on; train in one process, or take lora with trained_factors: both"
            )

    def before_step(self, model: nn.Module, optimiser: Optimizer) -> None:
        """Let techniques change the gradients and the learning rate of a step."""
        lr = float(optimiser.param_groups[0]["lr"])
        length = self.steps_per_round or self.total_steps or 1
        info = StepInfo(self.round_number, self.step % length, length, self.base_lr, lr)
        changed = techniques.before_optimiser_step(self._techniques, model, info)
        for group in optimiser.param_groups if changed != lr else ():
            group["lr"], group["scheduled_lr"] = (
                changed if group["lr"] == lr else group["lr"] * changed / lr,
                group["lr"],
            )

    def after_step(self, model: nn.Module, optimiser: Optimizer) -> None:
        """Restore the scheduled learning rate, count the step, and begin the next round after the last step of one."""
        for group in optimiser.param_groups:
            group["lr"] = group.pop("scheduled_lr", group["lr"])
        self.step += 1
        if self.steps_per_round is not None and self.step % self.steps_per_round == 0:
            self._begin_next_round(model, optimiser)

    def _begin_next_round(self, model: nn.Module, optimiser: Optimizer) -> None:
        """What a federation of one client does between rounds. The optimiser begins anew, as it does there."""
        if any(type(one).after_aggregation is not Technique.after_aggregation for one in self._techniques):
            self._aggregate(model)
        self.round_number += 1
        techniques.begin_round(self._techniques, model, self.round_number)
        optimiser.state.clear()

    def _aggregate(self, model: nn.Module) -> None:
        """Let techniques revise the state of a round, with what they measure on the last batch."""
        number, mode = self.round_number, {layer: layer.training for layer in model.modules()}
        model.eval()
        try:
            extras = techniques.compute_extra_payload(
                self._techniques, model, number, lambda: self._task.compute_loss(model, self._inputs).backward()
            )
        finally:
            for layer, training in mode.items():
                layer.training = training
        state = get_model_state(model, self._shared_names)
        payloads = [ExtraPayload(1.0, move_tensors(extras, torch.device("cpu")))]  # where a server has them
        set_model_state(model, techniques.after_aggregation(self._techniques, state, number, payloads))


def _count_processes() -> int:
    """The number of processes that train one model together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _changes_gradients(technique: Technique) -> bool:
    return type(technique).before_optimiser_step is not Technique.before_optimiser_step


def _replace_loss(output: Any, loss: Tensor) -> Any:
    """The output of a model, which is a mapping in transformers and a named tuple here, with another loss."""
    if isinstance(output, Mapping):
        return type(output)(**{**output, "loss": loss})
    return output._replace(loss=loss)


def _name_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that a model is called with, by name."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if torch.is_tensor(value) and name != "num_items_in_batch"}
