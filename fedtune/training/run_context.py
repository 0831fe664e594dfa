"""The run context: the model, its techniques and encoded data, built once per process for all clients and rounds."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedtune import continual, data, merging, models, tasks, techniques
from fedtune.accelerator import choose_device, find_device
from fedtune.data.encoded_prompts import EncodedPrompts
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import ColumnSettings, DataSettings, Recipe
from fedtune.recipe.validation_errors import explain_validation_error
from fedtune.seeds import derive_seed
from fedtune.techniques import Technique
from fedtune.training.device_classes import check_device_class
from fedtune.training.evaluation import EvaluatedModel
from fedtune.training.generation import GeneratedText, TextGenerator, require_positions
from fedtune.training.kept_tensors import mark_kept_tensors
from fedtune.training.model_checks import check_model_privacy
from fedtune.training.model_state import get_model_state, named_tensors
from fedtune.training.packing_checks import check_packing
from fedtune.training.paging_checks import check_paging
from fedtune.training.plain_blocks import find_blocks_problem
from fedtune.training.readable import require_readable

__all__ = ["RunContext", "clear_run_context", "get_run_context", "prepare_model", "set_run_context"]


def prepare_model(
    recipe: Recipe, labels: Sequence[str], *, device: str | None = None
) -> tuple[nn.Module, tuple[Technique, ...], list[str]]:
    """Return the model with its techniques applied, the techniques, and the names of the shared tensors.

    It is built on the CPU, so that the same numbers are drawn everywhere, and moved to ``device``, by default
    ``train.device``. Where there is none it stays, as on a server. ``require_device`` refuses before.
    """
    chosen = techniques.build_techniques(recipe.train.techniques)
    quantised = [found for found in (technique.make_quantisation_config() for technique in chosen) if found is not None]
    if len(quantised) > 1:
        raise ModelError("two techniques want to quantise the base; keep one of them")
    if recipe.model.paged:
        techniques.check_paged_base(chosen)
    task = tasks.get_task(recipe.task)
    model = models.load_model(
        recipe.model,
        task,
        labels,
        seed=derive_seed(recipe.seed, "head"),
        quantisation=quantised[0] if quantised else None,
        blocks_problem=find_blocks_problem(recipe, chosen),
    )
    for method in continual.list_methods(recipe):
        method.rewrite_model(model, task, recipe)
    trained = techniques.apply_techniques(chosen, model, task, derive_seed(recipe.seed, "techniques"))
    shared = mark_kept_tensors(recipe, model, chosen, trained)
    check_packing(recipe, model)
    check_paging(model, shared)
    return _move_model(model, choose_device(device or recipe.train.device), chosen), chosen, shared


def _move_model(model: nn.Module, device: torch.device, chosen: Sequence[Technique]) -> nn.Module:
    """Move a model to a device; ModelError if one of its techniques cannot compute there."""
    techniques.check_device_type(chosen, device.type)
    return model if device.type == "cpu" else model.to(device)


@dataclass
class RunContext:
    """A recipe and everything that is built from it. Each part is built when it is first used."""

    recipe: Recipe
    corpus: data.DataSplits = field(repr=False)
    model: nn.Module = field(repr=False)
    techniques: tuple[Technique, ...]
    shared_names: list[str] = field(repr=False)
    by_device_class: dict[str, "RunContext"] = field(default_factory=dict, repr=False)
    """The contexts of device classes with their own settings, by name. They share this context's examples."""
    opened_after: list[int] = field(default_factory=list, repr=False)
    """The rounds after which a drift alarm opened a task."""
    local_tensors: dict[str, Tensor] = field(init=False, repr=False)
    """The tensors that stay on each device, with their values before training."""
    _split_tasks: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Copy the local tensors while the model is untrained."""
        self.local_tensors = get_model_state(self.model, techniques.list_local_tensors(self.model))
        self._start = self._summarise_trainable() if self.task.needs_reference else None

    def _summarise_trainable(self) -> list[float]:
        """A number for each tensor that training changes."""
        tensors = named_tensors(self.model)
        return [float(tensors[name].detach().double().sum()) for name in self.shared_names]

    def for_client(self, client: int) -> "RunContext":
        """Return the context of a client: that of its device class, or this one."""
        return self.by_device_class.get(self.recipe.get_device_class(client).name, self)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return find_device(self.model)

    @cached_property
    def client_rows(self) -> list[np.ndarray]:
        """Indices into the training split, one sorted array per client. The examples of each task are partitioned."""
        return continual.partition_stream(self.recipe, self.corpus.train, self.corpus.label_names)

    @cached_property
    def stream_plan(self) -> continual.StreamPlan | None:
        """The plan of the recipe's stream, None without one."""
        return None if self.recipe.stream is None else continual.StreamPlan(self.recipe)

    def open_task(self, last_round: int) -> None:
        """Let the visit that is running end with a round, and the rest of its rounds be another visit."""
        self.recipe = continual.end_visit(self.recipe, last_round)
        self.opened_after.append(last_round)
        self.__dict__.pop("stream_plan", None)

    @cached_property
    def methods(self) -> tuple[continual.ContinualMethod, ...]:
        """The continual methods of the stream."""
        return continual.list_methods(self.recipe)

    @property
    def task_numbers(self) -> np.ndarray:
        """The task [n] of each example of the training split, -1 for none."""
        return self.number_split_tasks("train")

    def number_split_tasks(self, part: str) -> np.ndarray:
        """Return the task [n] of each example of a split, -1 for none."""
        if part not in self._split_tasks:
            table = getattr(self.corpus, part)
            self._split_tasks[part] = continual.number_tasks(self.recipe, table, self.corpus.label_names)
        return self._split_tasks[part]

    @cached_property
    def train(self) -> data.EncodedDataset:
        """The encoded training split."""
        return self._encode(self.corpus.train)

    @cached_property
    def validation(self) -> data.EncodedDataset:
        """The encoded validation split."""
        return self._encode(self.corpus.validation)

    @cached_property
    def test(self) -> data.EncodedDataset:
        """The encoded test split."""
        return self._encode(self.corpus.test)

    @property
    def task(self) -> tasks.Task:
        """The recipe's task."""
        return tasks.get_task(self.recipe.task)

    @property
    def main_metric(self) -> str:
        """The main metric: the recipe's, or else the task's."""
        return self.recipe.evaluation.main_metric or self.task.main_metric

    @cached_property
    def reader(self) -> Any:
        """The tokenizer or preprocessor that turns examples into inputs."""
        return tasks.load_reader(self.recipe)

    @property
    def evaluated_model(self) -> EvaluatedModel:
        """The model with the evaluation settings of the server."""
        settings = self.recipe.evaluation
        return EvaluatedModel(
            self.model,
            self.task,
            settings.batch_size,
            self.techniques,
            settings.metrics,
            self.reader,
            settings.generation,
        )

    @cached_property
    def prompts(self) -> EncodedPrompts:
        """The encoded prompts of ``evaluation.prompts``; RecipeError or ModelError if the model cannot answer them."""
        settings = self.recipe.evaluation
        if not settings.prompts:
            return EncodedPrompts([])
        found = self.task.encode_prompts(settings.prompts, self.corpus.train, self.recipe, self.reader)
        require_positions(self.model, found, settings.generation)
        return found

    def generate_samples(self) -> list[GeneratedText]:
        """Generate a text for each prompt with the model as it is now."""
        if not self.recipe.evaluation.prompts:
            return []
        settings = self.recipe.evaluation
        generator = TextGenerator(self.model, self.techniques, self.reader, settings.generation, settings.batch_size)
        seeds = [derive_seed(self.recipe.seed, "samples", number) for number in range(1, len(settings.prompts) + 1)]
        return generator.generate_texts(self.prompts, seeds)

    @cached_property
    def client_domains(self) -> dict[int, str]:
        """The most frequent domain of each client's examples; empty when the data has no domains."""
        domains = self.train.domains
        if domains is None:
            return {}
        mixes = {
            client: Counter(domains[index] for index in indices) for client, indices in enumerate(self.client_rows)
        }
        return {client: mix.most_common(1)[0][0] for client, mix in mixes.items()}

    def encode_source(self, source: str, columns: Mapping[str, str]) -> data.EncodedDataset:
        """Encode all examples of another source. ``columns`` maps canonical names to its columns."""
        try:
            chosen = DataSettings(source=source, columns=ColumnSettings.model_validate(columns))
        except ValidationError as error:
            raise RecipeError(explain_validation_error(error, ColumnSettings, "--columns")) from error
        recipe = self.recipe.model_copy(update={"data": chosen})
        return self._encode(tasks.load_all_examples(recipe, self.corpus.label_names))

    def count_tensors(self) -> int:
        """Return the number of tensors of the models."""
        return sum(len(named_tensors(context.model)) for context in (self, *self.by_device_class.values()))

    def share_memory(self) -> None:
        """Move the models to shared memory, and partition and encode the data before worker processes start."""
        for context in (self, *self.by_device_class.values()):
            context.model.share_memory()
        _ = self.client_rows, self.train

    def copy_writable_tensors(self) -> None:
        """In a worker process, replace the shared copies of trained or received tensors by private ones."""
        for context in (self, *self.by_device_class.values()):
            tensors = named_tensors(context.model)
            for name in [*self.shared_names, *self.local_tensors, *techniques.list_rebuilt_tensors(context.model)]:
                tensors[name].data = tensors[name].data.clone()

    def _encode(self, examples: data.Table) -> data.EncodedDataset:
        encoded = tasks.encode_examples(examples, self.recipe, self.reader)
        require_readable(self.model, encoded, self.recipe, self.reader)
        if not self.task.needs_reference or not len(encoded):
            return encoded
        if self._start != self._summarise_trainable():
            raise RuntimeError("examples with a reference are encoded before the model is trained")
        return self.task.add_reference(self.model, encoded)


_current_context: dict[str, RunContext] = {}


def get_run_context(recipe: str) -> RunContext:
    """Return the context of a recipe given as JSON. The latest context is cached, so a base model is loaded once."""
    if recipe not in _current_context:
        context = _build(recipe)
        set_run_context(context)
        _current_context[recipe] = context  # its own recipe has a preprocessor, this key has not
    return _current_context[recipe]


def set_run_context(context: RunContext) -> None:
    """Use the context for its recipe in this process."""
    _current_context.clear()
    _current_context[context.recipe.model_dump_json()] = context


def clear_run_context() -> None:
    """Release the cached context. A model that was trained must not be the start of another run."""
    _current_context.clear()


def _build(recipe: str) -> RunContext:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parsed = tasks.resolve_reader(Recipe.model_validate_json(recipe))
    corpus = tasks.load_data(parsed, tasks.load_class_names(parsed))
    model, chosen, shared = prepare_model(parsed, corpus.label_names)
    merging.check_merge_has_targets(merging.build_pipeline(parsed.merge).steps, model, shared)
    check_model_privacy(parsed, model, chosen, shared)
    if parsed.stream is not None and parsed.stream.drift is not None:
        continual.check_features_stay(chosen, model, len(corpus.label_names))
    context = RunContext(parsed, corpus, model, chosen, shared)
    context.by_device_class = _build_device_classes(context)
    if context.task.needs_reference:  # while the model is untrained
        _ = context.validation, context.test
    return context


def _build_device_classes(context: RunContext) -> dict[str, RunContext]:
    found: dict[str, RunContext] = {}
    for device in (device for device in context.recipe.devices if device.overridden_settings):
        recipe = context.recipe.apply_device_class(device)
        part = RunContext(recipe, context.corpus, *prepare_model(recipe, context.corpus.label_names))
        check_device_class(context, part, device.name)
        found[device.name] = part
    return found
