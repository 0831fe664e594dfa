"""What a process builds once and uses for every client and round: the model, its techniques and the encoded data."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor, nn

from fedtune import data, merging, models, tasks, techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import ColumnSettings, DataSettings, Recipe
from fedtune.recipe.validation_errors import explain_validation_error
from fedtune.seeds import derive_seed
from fedtune.techniques import Technique
from fedtune.training.activation_statistics import check_merge_has_targets
from fedtune.training.device_classes import check_device_class
from fedtune.training.evaluation import EvaluatedModel
from fedtune.training.model_checks import check_model_privacy
from fedtune.training.model_state import get_model_state, named_tensors
from fedtune.training.packing_checks import check_packing
from fedtune.training.readable import require_readable

__all__ = ["RunContext", "clear_run_context", "get_run_context", "prepare_model", "set_run_context"]


def prepare_model(recipe: Recipe, labels: Sequence[str]) -> tuple[nn.Module, tuple[Technique, ...], list[str]]:
    """The model with its techniques applied, the techniques, and the names of the tensors a federation shares."""
    chosen = techniques.build_techniques(recipe.train.techniques)
    quantised = [found for found in (technique.make_quantisation_config() for technique in chosen) if found is not None]
    if len(quantised) > 1:
        raise ModelError("two techniques want to quantise the base; keep one of them")
    task = tasks.get_task(recipe.task)
    model = models.load_model(
        recipe.model,
        task,
        labels,
        seed=derive_seed(recipe.seed, "head"),
        quantisation=quantised[0] if quantised else None,
    )
    shared = techniques.apply_techniques(chosen, model, task, derive_seed(recipe.seed, "techniques"))
    check_packing(recipe, model)
    return model, chosen, shared


@dataclass
class RunContext:
    """A recipe with all that is built from it; each part is made when it is first asked for."""

    recipe: Recipe
    corpus: data.DataSplits = field(repr=False)
    model: nn.Module = field(repr=False)
    techniques: tuple[Technique, ...]
    shared_names: list[str] = field(repr=False)
    by_device_class: dict[str, "RunContext"] = field(default_factory=dict, repr=False)
    """Of device classes with settings of their own, by name; their examples are taken from here."""
    local_tensors: dict[str, Tensor] = field(init=False, repr=False)
    """What each device keeps for itself, as it is before training."""

    def __post_init__(self) -> None:
        """Read them while the model is untrained."""
        self.local_tensors = get_model_state(self.model, techniques.list_local_tensors(self.model))

    def for_client(self, client: int) -> "RunContext":
        """What a client trains with: its device class's model and settings, or those of all."""
        return self.by_device_class.get(self.recipe.get_device_class(client).name, self)

    @cached_property
    def client_rows(self) -> list[np.ndarray]:
        """Indices into the training part, one sorted array per client."""
        return data.partition_examples(self.recipe, self.corpus.train)

    @cached_property
    def train(self) -> data.EncodedDataset:
        """The training part, encoded."""
        return self._encode(self.corpus.train)

    @cached_property
    def validation(self) -> data.EncodedDataset:
        """The validation part, encoded."""
        return self._encode(self.corpus.validation)

    @cached_property
    def test(self) -> data.EncodedDataset:
        """The test part, encoded."""
        return self._encode(self.corpus.test)

    @property
    def task(self) -> tasks.Task:
        """The recipe's task."""
        return tasks.get_task(self.recipe.task)

    @cached_property
    def reader(self) -> Any:
        """What turns examples into inputs: a tokenizer or a preprocessor."""
        return tasks.load_reader(self.recipe)

    @property
    def evaluated_model(self) -> EvaluatedModel:
        """The model as the server scores it."""
        settings = self.recipe.evaluation
        return EvaluatedModel(
            self.model, self.task, settings.batch_size, self.techniques, settings.metrics, self.reader
        )

    @cached_property
    def client_domains(self) -> dict[int, str]:
        """The domain most of a client's examples belong to; empty when the data has no domains."""
        domains = self.train.domains
        if domains is None:
            return {}
        mixes = {
            client: Counter(domains[index] for index in indices) for client, indices in enumerate(self.client_rows)
        }
        return {client: mix.most_common(1)[0][0] for client, mix in mixes.items()}

    def encode_source(self, source: str, columns: Mapping[str, str]) -> data.EncodedDataset:
        """All examples of another source, encoded; ``columns`` says which of its columns holds what."""
        try:
            chosen = DataSettings(source=source, columns=ColumnSettings.model_validate(columns))
        except ValidationError as error:
            raise RecipeError(explain_validation_error(error, ColumnSettings, "--columns")) from error
        recipe = self.recipe.model_copy(update={"data": chosen})
        return self._encode(tasks.load_all_examples(recipe, self.corpus.label_names))

    def share_memory(self) -> None:
        """Move the models into memory that worker processes can map, and split and encode before they do."""
        for shop in (self, *self.by_device_class.values()):
            shop.model.share_memory()
        _ = self.client_rows, self.train

    def copy_writable_tensors(self) -> None:
        """In a worker process: replace the mapped copies of what is trained or received by own ones."""
        for shop in (self, *self.by_device_class.values()):
            tensors = named_tensors(shop.model)
            for name in [*self.shared_names, *self.local_tensors]:
                tensors[name].data = tensors[name].data.clone()

    def _encode(self, examples: data.Table) -> data.EncodedDataset:
        encoded = tasks.encode_examples(examples, self.recipe, self.reader)
        require_readable(self.model, encoded, self.recipe, self.reader)
        return encoded


_current_context: dict[str, RunContext] = {}


def get_run_context(recipe: str) -> RunContext:
    """The workshop of a recipe given as JSON; the latest one is kept, so that a base model is loaded once."""
    if recipe not in _current_context:
        shop = _build(recipe)
        set_run_context(shop)
        _current_context[recipe] = shop  # as it was asked for, before the model's preprocessor was written into it
    return _current_context[recipe]


def set_run_context(shop: RunContext) -> None:
    """Make a workshop the one this process uses for its recipe."""
    _current_context.clear()
    _current_context[shop.recipe.model_dump_json()] = shop


def clear_run_context() -> None:
    """Let go of the workshop that is kept: once its model was trained, it is no start for another run."""
    _current_context.clear()


def _build(recipe: str) -> RunContext:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parsed = tasks.resolve_reader(Recipe.model_validate_json(recipe))
    corpus = tasks.load_data(parsed, tasks.load_class_names(parsed))
    model, chosen, shared = prepare_model(parsed, corpus.label_names)
    check_merge_has_targets(merging.build_pipeline(parsed.merge).steps, model, shared)
    check_model_privacy(parsed, model, chosen, shared)
    shop = RunContext(parsed, corpus, model, chosen, shared)
    shop.by_device_class = _build_device_classes(shop)
    return shop


def _build_device_classes(shop: RunContext) -> dict[str, RunContext]:
    found: dict[str, RunContext] = {}
    for device in (device for device in shop.recipe.devices if device.overridden_settings):
        recipe = shop.recipe.apply_device_class(device)
        part = RunContext(recipe, shop.corpus, *prepare_model(recipe, shop.corpus.label_names))
        check_device_class(shop, part, device.name)
        found[device.name] = part
    return found
