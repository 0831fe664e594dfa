"""Sums over examples of the diagonal Fisher information of a model: sums of several clients can be added.

Every example passes alone, so neither the size of batches nor padding can change the sums.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors, use_autocast
from fedtune.data import EncodedDataset
from fedtune.merging.combine.fisher import square_gradient
from fedtune.tasks import Task
from fedtune.techniques import Technique, begin_step

__all__ = [
    "FisherKind",
    "FisherSums",
    "LabelChoice",
    "choose_fisher_kind",
    "evaluation_mode",
    "iter_single_examples",
    "sum_fisher_information",
]

FisherKind = Literal["exact", "sampled", "empirical"]

_MOST_EXACT_CLASSES = 10


class LabelChoice(NamedTuple):
    """Whose gradients are squared: ``exact`` takes all classes by their probability, ``sampled`` one drawn class,
    ``empirical`` the true label. Only ``classes`` can be predicted; None for all of them.
    """

    kind: FisherKind
    classes: Sequence[int] | None = None
    seed: int = 0


class FisherSums(NamedTuple):
    """The sums by parameter name, and the number of examples."""

    sums: dict[str, Tensor]
    num_examples: int


def choose_fisher_kind(task: Task, classes: Collection[int]) -> FisherKind:
    """Return the best kind that is affordable: exact for few classes. Tasks without classes have only empirical."""
    if not task.has_classes:
        return "empirical"
    return "exact" if len(classes) <= _MOST_EXACT_CLASSES else "sampled"


def sum_fisher_information(
    model: nn.Module,
    task: Task,
    techniques: Sequence[Technique],
    examples: Iterable[Mapping[str, Tensor]],
    names: Sequence[str],
    labels: LabelChoice,
) -> FisherSums:
    """Return sum_i sum_y p(y | x_i) (d log p(y | x_i) / d theta)^2 of the parameters ``names``, fp32 on the CPU.

    Each of ``examples`` is a batch of one example. Those without a prediction (texts of one token) do not count.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    sums = {name: torch.zeros(one.shape, device=one.device) for name, one in parameters.items()}
    generator = torch.Generator().manual_seed(labels.seed)
    device, count = find_device(model), 0
    with evaluation_mode(model), require_gradients(parameters.values()):
        for example in (one for one in examples if task.count_predictions(one["labels"])):
            count += 1
            batch = move_tensors(example, device)
            begin_step(techniques, model, batch, 1.0)
            for weight, log_likelihood in _iter_log_likelihoods(model, task, batch, labels, generator):
                gradients = torch.autograd.grad(
                    log_likelihood, list(parameters.values()), retain_graph=labels.kind == "exact", allow_unused=True
                )
                _add_squares(sums.values(), gradients, weight)
    return FisherSums({name: total.cpu() for name, total in sums.items()}, count)


def iter_single_examples(examples: EncodedDataset, rows: Iterable[int]) -> Iterator[dict[str, Tensor]]:
    """Yield a batch for each row."""
    for row in rows:
        yield examples.make_batch([int(row)])


def _add_squares(sums: Iterable[Tensor], gradients: Iterable[Tensor | None], weight: float) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total.add_(square_gradient(gradient), alpha=weight)


def _iter_log_likelihoods(
    model: nn.Module, task: Task, batch: Mapping[str, Tensor], labels: LabelChoice, generator: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """Yield weights and the log-likelihoods whose gradients are squared."""
    if labels.kind == "empirical":
        with use_autocast(model):
            yield 1.0, -task.compute_loss(model, batch)
        return
    log_p = _predict_log_probabilities(model, batch, labels.classes)
    probabilities = log_p.detach().exp().cpu()
    if labels.kind == "sampled":
        yield 1.0, log_p[int(torch.multinomial(probabilities, 1, generator=generator))]
        return
    for one, weight in zip(log_p, probabilities.tolist(), strict=True):
        yield weight, one


def _predict_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor], classes: Sequence[int] | None) -> Tensor:
    """Return the log-probabilities [classes] of the one example in a batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with use_autocast(model):
        logits: Tensor = model(**inputs).logits[0]
    return (logits if classes is None else logits[list(classes)]).float().log_softmax(-1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block, no layer drops or normalises by the batch; afterwards, each has its mode of before."""
    before = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training


@contextmanager
def require_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make all parameters require gradients inside the block, including frozen ones."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
