"""Check a task on the tiny model that it would load."""

from collections.abc import Iterator

import torch
from torch import nn

from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.library.tiny_models import TINY_MODELS, TinyModel
from fedtune.tasks import ScoreSums, Task, get_task

__all__ = ["check_task"]

_MODELS = {
    "AutoModelForCausalLM": "a Llama",
    "AutoModelForSequenceClassification": "a BERT classifier",
    "AutoModelForImageClassification": "a ResNet",
}

_COLUMNS = {"text", "label", "image"}
"""What the batches of tiny models are made of."""


def check_task(name: str) -> Iterator[CheckResult]:
    """Check columns and metrics, and the loss and the scores on a tiny model of the task's class."""
    task = get_task(name)
    yield run_check("names its columns and its metrics", lambda: _check_names(task))
    tiny = next((one for one in TINY_MODELS if one.name == _MODELS.get(task.auto_class)), None)
    if tiny is None or not set(task.columns) <= _COLUMNS:
        needed = f"{task.auto_class} with {', '.join(task.columns)}"
        yield CheckResult("skipped", "computes a loss", f"there is no tiny model and batch of {needed}")
        return
    with torch.random.fork_rng(devices=[]):
        model = tiny.build(0)
    yield run_check(f"computes a loss of {tiny.name} with gradients", lambda: _check_loss(task, tiny, model))
    yield run_check(f"scores each example of {tiny.name}", lambda: _check_scores(task, tiny, model))


def _check_names(task: Task) -> None:
    require(bool(task.columns), "columns is empty")
    known = task.compute_metrics(ScoreSums())
    require("loss" in known, "compute_metrics gives no loss")
    require(task.main_metric in known, f"main_metric is {task.main_metric}, which compute_metrics does not give")


def _check_loss(task: Task, tiny: TinyModel, model: nn.Module) -> None:
    batch = tiny.make_batch(1)
    loss = task.compute_loss(model, batch)
    require(loss.dim() == 0 and bool(loss.isfinite()), "the loss is no finite number")
    require(task.count_predictions(batch["labels"]) > 0, "a batch with labels has no prediction")
    loss.backward()
    require(any(one.grad is not None and bool(one.grad.any()) for one in model.parameters()), "no gradient arrives")


def _check_scores(task: Task, tiny: TinyModel, model: nn.Module) -> None:
    batch = tiny.make_batch(1)
    with torch.no_grad():
        scores = task.score_batch(model.eval(), batch, None)
    require(len(scores) == len(batch["labels"]), f"{len(scores)} scores for {len(batch['labels'])} examples")
    sums = ScoreSums()
    for score in scores:
        sums.add(score, keep_output=task.keeps_outputs)
    counted = task.count_predictions(batch["labels"])
    require(sums.count == counted, f"the scores count {sums.count} predictions, and the loss {counted}")
    values = task.compute_metrics(sums)
    odd = [name for name, value in values.items() if not isinstance(value, float)]
    require(not odd, f"{odd[0] if odd else ''} is no number")
