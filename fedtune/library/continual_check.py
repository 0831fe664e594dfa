"""Check a continual method on a tiny model and a stream of two tasks: rounds, uploads, the border, and what is kept."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune import continual, techniques
from fedtune.continual import ContinualMethod
from fedtune.data.encoded_texts import EncodedTexts
from fedtune.errors import ModelError, RecipeError
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.library.prepared_model import prepare
from fedtune.library.tiny_models import TINY_MODELS
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.tasks import get_task
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, train_local_model
from fedtune.training.stream_round import StreamRound
from fedtune.training.stream_tasks import follow_stream

__all__ = ["check_continual_method"]

_TECHNIQUES = ("full", "head-only", "inf-lora")
_LABELS, _ROWS, _CLIENT = ("a", "b", "c"), 12, 0
_STREAM = {
    "setting": "class",
    "tasks": [{"name": "first", "where": ["a", "b"], "rounds": 1}, {"name": "c", "rounds": 1}],
}
Tensors = Mapping[str, Tensor]


@dataclass
class _Device:
    """One client of a stream. ``stored`` and ``memory`` are what it and the server keep after each task."""

    recipe: Recipe
    method: ContinualMethod

    def __post_init__(self) -> None:
        tiny = next(one for one in TINY_MODELS if get_task(one.task).has_classes and get_task(one.task).reads_text)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._prepared = prepare(
                tiny.build(0), [{one.name: one.settings} for one in self.recipe.train.techniques], task=tiny.task
            )
            batches = [tiny.make_batch(seed) for seed in range(_ROWS // 4)]
        labels = torch.arange(_ROWS) % len(_LABELS)
        ids = torch.cat([batch["input_ids"] for batch in batches]).int()
        lengths = torch.full((_ROWS,), ids.shape[1])
        self._examples = EncodedTexts(ids, lengths, labels, None, None)
        self._plan = continual.StreamPlan(self.recipe)
        self.names = self._prepared.shared_names
        self.state = get_model_state(self._prepared.model, self.names)
        self.stored: dict[int, Tensors] = {}
        self.memory: Tensors = {}

    def train(self, number: int) -> LocalTrainingResult:
        """Train in round 1 or 2, which is the first and only one of its task."""
        place = self._plan.find_place(number, _CLIENT)
        assert place is not None
        classes = continual.list_classes(self._plan, _LABELS, place.seen)
        rows = np.flatnonzero(np.isin(np.arange(_ROWS) % len(_LABELS), [0, 1] if number == 1 else [2]))
        sent = self.method.list_sent_memory(self.memory, place)
        received = continual.name_memory(self.method, {name: self.memory[name] for name in sent})
        stream = StreamRound(
            place,
            rows,
            [self.method],
            classes,
            classes,
            len(_LABELS),
            uploading=[self.method],
            stored=self.stored,
            received=received,
        )
        model, chosen = self._prepared.model, self._prepared.techniques
        client = ClientRound(model, chosen, self.recipe, self._examples, rows, number, _CLIENT, stream=stream)
        return train_local_model(client, self.state)

    def end_task(self, number: int, result: LocalTrainingResult) -> continual.BorderResult:
        """Return what the server makes of the client's round."""
        after = {name: tensor + result.delta.get(name, 0) for name, tensor in self.state.items()}
        upload = continual.select_memory(self.method, result.extra_payload)
        return self.method.after_task(
            continual.Border(
                self.recipe,
                self._prepared.model,
                number - 1,
                number - 1,
                number,
                self.state,
                self.state,
                after,
                self.memory,
                [continual.TaskUpload(_CLIENT, 1.0, upload)],
                _LABELS,
            )
        )


def check_continual_method(name: str) -> Iterator[CheckResult]:
    """Check a method with its default settings; one that does not fit the tiny stream is skipped with its reason."""
    method: ContinualMethod = build_unit("fedtune.continual", Unit(name=name), "stream.memory")
    recipe = _choose_recipe(name, "consolidate" if method.consolidates else "memory")
    checks = {
        "a round of a task gives the same bits twice": _check_repeat,
        "uploads what it declares": _check_upload,
        "ends a task without changing what it is given": _check_border,
        "a round of the next task uses what was kept": _check_next_task,
    }
    refusals = (ModelError, RecipeError)
    fits = run_check("fits a stream of classes", lambda: continual.check_stream(recipe), refusals)
    yield fits
    for what, check in checks.items() if fits.status == "ok" else ():
        yield run_check(what, partial(check, recipe, method), refusals)


def _choose_recipe(name: str, key: str) -> Recipe:
    """Return the recipe with the first technique that the method allows; the first one if it allows none."""
    recipes = [_make_recipe(name, key, technique) for technique in _TECHNIQUES]
    for recipe in recipes:
        with suppress(ModelError, RecipeError):
            continual.check_stream(recipe)
            return recipe
    return recipes[0]


def _make_recipe(name: str, key: str, technique: str) -> Recipe:
    settings: dict[str, Any] = {
        "version": 2,
        "name": "check",
        "task": "text-classification",
        "model": {"source": "path:nowhere"},
        "data": {"source": "csv:nowhere"},
        "devices": [{"count": 1}],
        "train": {"techniques": [technique], "batch_size": 4, "local_steps": 2, "lr": 0.01},
        "federation": {},
        "stream": {**_STREAM, key: [name]},
    }
    recipe = Recipe.model_validate(settings)
    chosen = follow_stream(recipe, techniques.build_techniques(recipe.train.techniques))
    units = [Unit(name=one.name, settings=one.model_dump(mode="json")) for one in chosen]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"techniques": units})})


def _check_repeat(recipe: Recipe, method: ContinualMethod) -> None:
    first, second = (_Device(recipe, method).train(1) for _ in range(2))
    for kept in ("delta", "extra_payload", "remembered"):
        one, other = getattr(first, kept), getattr(second, kept)
        same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        require(same, f"two rounds with the same seed differ in {kept}")
    odd = [key for key, tensor in first.delta.items() if not bool(tensor.isfinite().all())]
    require(not odd, f"the change of {odd[0] if odd else ''} is not finite")


def _check_upload(recipe: Recipe, method: ContinualMethod) -> None:
    device = _Device(recipe, method)
    sent = continual.select_memory(method, device.train(1).extra_payload)
    declared = method.declare_upload(device._prepared.model, recipe, list(device.names))
    require(sent.keys() == declared.keys(), "what is uploaded has other names than what declare_upload says")
    odd = [key for key, form in declared.items() if tuple(sent[key].shape) != tuple(form.shape)]
    require(not odd, f"{odd[0] if odd else ''} has another shape than declare_upload says")


def _check_border(recipe: Recipe, method: ContinualMethod) -> None:
    device = _Device(recipe, method)
    result = device.train(1)
    kept = {key: tensor.clone() for key, tensor in device.state.items()}
    first, second = (device.end_task(1, result) for _ in range(2))
    require(first.state.keys() == kept.keys(), "the next state has other tensors")
    for one, other in ((first.state, second.state), (first.memory, second.memory)):
        same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        require(same, "the same task ends in another state or memory the second time")
    require(
        all(torch.equal(device.state[key], was) for key, was in kept.items()), "after_task changes what it is given"
    )


def _check_next_task(recipe: Recipe, method: ContinualMethod) -> None:
    device = _Device(recipe, method)
    result = device.train(1)
    ended = device.end_task(1, result)
    begun = method.start_task(device.state, ended.state, ended.memory)
    device.state, device.memory, device.stored = dict(begun), ended.memory, {0: result.remembered}
    again = device.train(2)
    odd = [key for key, tensor in again.delta.items() if not bool(tensor.isfinite().all())]
    require(not odd, f"the change of {odd[0] if odd else ''} is not finite")
