"""Check an algorithm on a tiny model: two rounds of a client, what it uploads, and what the server makes of it."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fedtune import algorithms, techniques
from fedtune.algorithms import Algorithm, MergedUpdates, Weighing
from fedtune.data.encoded_texts import EncodedTexts
from fedtune.errors import ModelError, RecipeError
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.library.prepared_model import prepare
from fedtune.library.tiny_models import TINY_MODELS
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.tasks import get_task
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, train_local_model
from fedtune.training.algorithm_inputs import AlgorithmInputs
from fedtune.wire.client_update import ClientUpdate

__all__ = ["check_algorithm_unit"]

_ROWS = 12
Tensors = Mapping[str, Tensor]


class _Client:
    """One client of two. ``stored`` and ``memory`` are what it and the server keep."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm, self.recipe = algorithm, _make_recipe(algorithm)
        tiny = next(one for one in TINY_MODELS if get_task(one.task).has_classes and get_task(one.task).reads_text)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._prepared = prepare(tiny.build(0), ["full"], task=tiny.task)
            ids = torch.cat([tiny.make_batch(seed)["input_ids"] for seed in range(_ROWS // 4)]).int()
        labels = torch.arange(_ROWS) % 3
        self._examples = EncodedTexts(ids, torch.full((_ROWS,), ids.shape[1]), labels, None, None)
        self.kept = self._keep_tensors()
        shared = [name for name in self._prepared.shared_names if name not in self.kept]
        self.state = get_model_state(self._prepared.model, shared)
        self.shapes = {name: tuple(one.shape) for name, one in self.state.items()}
        self.stored: Tensors = {}
        self.memory: Tensors = {}
        algorithm.check_model(self._prepared.model)

    def _keep_tensors(self) -> Tensors:
        """Mark what stays on the client, and return its values before training."""
        model, shared = self._prepared.model, self._prepared.shared_names
        pairs = techniques.list_low_rank_pairs(self._prepared.techniques, model)
        techniques.keep_tensors(model, self.algorithm.select_kept(model, shared, pairs))
        return get_model_state(model, techniques.list_local_tensors(model))

    def train(self, number: int) -> LocalTrainingResult:
        sent = self.algorithm.list_sent_memory(self.memory, list(self.state))
        received = {name: self.memory[name] for name in sent}
        inputs = AlgorithmInputs(self.algorithm, self.stored, received)
        model, chosen, rows = self._prepared.model, self._prepared.techniques, np.arange(_ROWS)
        client = ClientRound(model, chosen, self.recipe, self._examples, rows, number, 0, self.kept, algorithm=inputs)
        return train_local_model(client, self.state)

    def merge(self, result: LocalTrainingResult, folder: Path) -> None:
        """Let the server merge the round's only update, and go on from there."""
        path = folder / "update.safetensors"
        safetensors.torch.save_file({**result.delta, **result.extra_payload}, path)
        update = ClientUpdate(0, result.num_examples, path)
        [scale] = self.algorithm.compute_scales(Weighing(self.recipe, self.shapes, [update], [1.0]))
        require(0 < scale < float("inf"), f"the update is scaled by {scale}")
        after = {name: one + scale * result.delta[name] for name, one in self.state.items()}
        merged = MergedUpdates(self.state, after, self.shapes, [update], self.memory, 2)
        kept = {name: one.clone() for name, one in after.items()}
        first, again = self.algorithm.after_merge(merged), self.algorithm.after_merge(merged)
        for one, other in zip(first, again, strict=True):
            require(all(torch.equal(one[name], other[name]) for name in one), "two merges of one round differ")
        require(all(torch.equal(after[name], kept[name]) for name in kept), "it changes the merged state in place")
        require(all(bool(one.isfinite().all()) for one in first.state.values()), "the next state is not finite")
        self.state, self.memory = dict(first.state), first.memory
        self.stored, self.kept = result.algorithm_memory, result.local_tensors


def check_algorithm_unit(name: str) -> Iterator[CheckResult]:
    """Check an algorithm with its default settings."""
    algorithm: Algorithm = build_unit("fedtune.algorithms", Unit(name=name), "federation.algorithm")
    refusals = (ModelError, RecipeError)
    yield run_check("a round gives the same bits twice", partial(_check_repeat, algorithm), refusals)
    yield run_check("uploads what it declares", partial(_check_upload, algorithm), refusals)
    yield run_check("three rounds go on from what was kept", partial(_check_rounds, algorithm), refusals)


def _make_recipe(algorithm: Algorithm) -> Recipe:
    unit = {algorithm.name: algorithm.model_dump(mode="json")}
    return Recipe.model_validate(
        {
            "name": "example",
            "task": "text-classification",
            "model": {"source": "path:nowhere"},
            "data": {"source": "sample:nothing"},
            "devices": [{"count": 2}],
            "train": {"optimiser": "sgd", "lr": 0.05, "batch_size": 4, "local_steps": 4},
            "federation": {"rounds": 3, "algorithm": unit},
        }
    )


def _check_repeat(algorithm: Algorithm) -> None:
    first, second = (_Client(algorithm).train(1) for _ in range(2))
    require(all(torch.equal(one, second.delta[name]) for name, one in first.delta.items()), "the deltas differ")


def _check_upload(algorithm: Algorithm) -> None:
    client = _Client(algorithm)
    found = algorithms.select_tensors(algorithm, client.train(1).extra_payload)
    declared = algorithm.declare_upload(client.shapes)
    require(found.keys() == declared.keys(), f"it uploads {sorted(found)} and declares {sorted(declared)}")
    shapes = {name: tuple(one.shape) for name, one in found.items()}
    require(all(shapes[name] == form.shape for name, form in declared.items()), "an upload has another shape")


def _check_rounds(algorithm: Algorithm) -> None:
    client = _Client(algorithm)
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2, 3):
            client.merge(client.train(number), Path(folder))
