"""A model of yours, prepared by techniques for a training loop of yours."""

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fedtune import techniques
from fedtune.accelerator import find_device
from fedtune.errors import ModelError, RecipeError, StoreError
from fedtune.library.measured_step import StepMemory, measure_step
from fedtune.library.step_hooks import StepHooks
from fedtune.recipe.schema import Unit, split_joined
from fedtune.seeds import derive_seed
from fedtune.tasks import Task, get_task
from fedtune.techniques import Technique

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["ParameterCount", "PreparedModel", "prepare"]

_MARK = "prepared_by_fedtune"


class ParameterCount(NamedTuple):
    """Numbers of parameters: those trained now, and all."""

    trainable: int
    total: int


def prepare(
    model: nn.Module, units: str | Mapping[str, Any] | Sequence[Any], *, task: str, seed: int = 0
) -> "PreparedModel":
    """Apply techniques to ``model`` itself, so that any loop trains what they select in the memory they need.

    They work on the device that the model is on. ``measure`` needs a batch on the same one.

    ``units`` is ``"lora+gradient-checkpointing"``, a list of units, or a mapping such as ``{"lora": {"rank": 4}}``.
    Raises RecipeError for a wrong name, setting or combination, and ModelError if the model does not fit.

    >>> import fedtune
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                     num_attention_heads=2)
    >>> model = LlamaForCausalLM(shape)
    >>> prepared = fedtune.prepare(model, {"lora": {"rank": 4, "trained_factors": "both"}}, task="text-generation")
    >>> prepared.model is model
    True
    >>> prepared.count_parameters()
    ParameterCount(trainable=2176, total=8656)
    """
    if vars(model).get(_MARK):
        raise ModelError(
            f"this {type(model).__name__} is prepared already; call merge() on it, or load the model again"
        )
    if getattr(model, "peft_config", None):
        raise ModelError(
            f"this {type(model).__name__} has adapters of PEFT; prepare the model that merge_and_unload() returns"
        )
    chosen = techniques.build_techniques(_parse_units(units), "techniques")
    estimating = [one.name for one in chosen if one.estimates_gradients]
    if estimating:
        raise RecipeError(
            f"techniques: {estimating[0]} takes its steps in a round of fedtune, without a backward pass or an "
            "optimiser of torch; train it with fedtune.simulate, or leave it out"
        )
    quantising = [one.name for one in chosen if one.make_quantisation_config() is not None]
    if quantising and not getattr(model, "is_quantized", False):
        raise ModelError(f"{quantising[0]} needs a model in four bits; load it with quantization_config, or take lora")
    found, device = get_task(task), find_device(model)
    techniques.check_device_type(chosen, device.type)
    model.to("cpu")  # as for a run: techniques draw what they add on the CPU, and some run the model with it
    shared = techniques.apply_techniques(chosen, model, found, derive_seed(seed, "techniques"))
    model.to(device)
    vars(model)[_MARK] = True
    return PreparedModel(model, chosen, found, shared)


def _parse_units(units: str | Mapping[str, Any] | Sequence[Any]) -> list[Unit]:
    listed = [{name: settings} for name, settings in units.items()] if isinstance(units, Mapping) else units
    try:
        return TypeAdapter(list[Unit]).validate_python(split_joined(listed))
    except ValidationError as error:
        raise RecipeError(
            "techniques: write them as 'lora+bias', as a list of names, or as {'lora': {'rank': 8}}"
        ) from error


class PreparedModel:
    """A handle around a model that techniques have rewritten. ``model`` is the object that was given."""

    def __init__(self, model: nn.Module, chosen: Sequence[Technique], task: Task, shared_names: Sequence[str]) -> None:
        self.model, self.techniques, self.task = model, tuple(chosen), task
        self.shared_names = list(shared_names)
        self._hooks = StepHooks(chosen, task, shared_names)
        self._handles = self._hooks.install(model)
        self._optimiser_handles: list[RemovableHandle] = []
        self._merged = False

    @property
    def trainable(self) -> list[str]:
        """Names of the tensors that are trained now; with alternating factors, those of this round."""
        return techniques.list_trainable_tensors(self.model)

    def count_parameters(self) -> ParameterCount:
        """The number of parameters that are trained now, and of all."""
        counts = {parameter: parameter.numel() for parameter in self.model.parameters()}
        return ParameterCount(sum(n for one, n in counts.items() if one.requires_grad), sum(counts.values()))

    def measure(self, batch: Mapping[str, Tensor]) -> StepMemory:
        """The memory of a training step on a batch. The model is the same afterwards."""
        self._hooks.is_measuring = True
        try:
            return measure_step(self.model, batch, self.task.compute_loss)
        finally:
            self._hooks.is_measuring = False

    def attach(
        self, optimiser: Optimizer, *, steps_per_round: int | None = None, total_steps: int | None = None
    ) -> None:
        """Let techniques act at each step of an optimiser of torch. Call it before the first step.

        Needed by techniques that change gradients (``dynamic-pruning``) or choose what is trained in each round
        (``lora`` with alternating factors): ``steps_per_round`` steps are a round. The optimiser also gets the
        parameters that are frozen in this round. ``total_steps`` lets settings change over the training
        (``deft`` with ``eps_start``).
        """
        self._require_unmerged()
        self._hooks.check_rounds(steps_per_round)
        self.detach()
        inner = _unwrap(optimiser)
        hooks, group = self._hooks, inner.param_groups[0]
        hooks.steps_per_round, hooks.total_steps = steps_per_round, total_steps
        hooks.base_lr, hooks.is_attached = float(group.get("initial_lr", group["lr"])), True
        known = {id(parameter) for one in inner.param_groups for parameter in one["params"]}
        named = dict(self.model.named_parameters())
        group["params"] += [named[name] for name in self.shared_names if name in named and id(named[name]) not in known]
        self._optimiser_handles = [
            inner.register_step_pre_hook(lambda *_: hooks.before_step(self.model, inner)),
            inner.register_step_post_hook(lambda *_: hooks.after_step(self.model, inner)),
        ]

    def detach(self) -> None:
        """Stop acting at the steps of the optimiser."""
        for handle in self._optimiser_handles:
            handle.remove()
        self._optimiser_handles, self._hooks.is_attached = [], False

    def make_callback(self, *, steps_per_round: int | None = None) -> "TrainerCallback":
        """A callback for the Trainer of transformers, and Trainers made from it: it attaches the optimiser."""
        from fedtune.library.trainer_callback import PreparedModelCallback

        self._hooks.check_rounds(steps_per_round)
        return PreparedModelCallback(self, steps_per_round)

    def skip_to_step(self, step: int) -> None:
        """Continue at a later step, in the round that it belongs to: for a training that is resumed."""
        self._hooks.step = step
        self._hooks.round_number = 1 + step // (self._hooks.steps_per_round or step + 1)
        techniques.begin_round(self.techniques, self.model, self._hooks.round_number)

    def merge(self) -> nn.Module:
        """Merge what was trained into plain layers and return the model, which no longer needs fedtune."""
        self._require_unmerged()
        self.detach()
        self._remove_hooks()
        device = find_device(self.model)
        techniques.merge_into_weights(self.techniques, self.model)
        if device.type != "cpu":
            self.model.to(device)  # layers that return to their place, such as removed norms, did not move with it
        vars(self.model).pop(_MARK, None)
        self._merged = True
        return self.model

    def save(self, folder: str | Path) -> Path:
        """Write the merged model to a new folder that transformers loads. The model itself stays as it is.

        Before ``merge()`` a copy of the model is merged, which needs the memory of a second model on the CPU.
        """
        target = Path(folder)
        if target.exists():
            raise StoreError(f"{target} exists already; choose another folder")
        if not hasattr(type(self.model), "save_pretrained"):
            raise ModelError(
                f"a {type(self.model).__name__} cannot save itself; call merge() and save its state_dict()"
            )
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}."))
        try:
            saved: Any = self.model if self._merged else self._copy_merged()
            saved.save_pretrained(beside)
            beside.chmod(0o755)
            beside.replace(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return target

    def _copy_merged(self) -> nn.Module:
        self._remove_hooks()
        try:
            copied = _copy_to_cpu(self.model)
        finally:
            self._handles = self._hooks.install(self.model)
        techniques.merge_into_weights(self.techniques, copied)
        return copied

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _require_unmerged(self) -> None:
        if self._merged:
            raise ModelError("the techniques are merged into the model already; prepare it again to train on")


def _copy_to_cpu(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU. Weights in four bits stay where they are: they know how to copy themselves."""
    if getattr(model, "is_quantized", False) or find_device(model).type == "cpu":
        return copy.deepcopy(model)
    made: dict[int, Any] = {id(one): nn.Parameter(one.detach().cpu(), one.requires_grad) for one in model.parameters()}
    made |= {id(one): one.detach().cpu() for one in model.buffers()}
    return copy.deepcopy(model, made)


def _unwrap(optimiser: Any) -> Optimizer:
    """The optimiser of torch inside that of accelerate."""
    inner = getattr(optimiser, "optimizer", optimiser)
    if not isinstance(inner, Optimizer):
        raise ModelError(f"a {type(inner).__name__} is no optimiser of torch; attach one that has step hooks")
    return inner
