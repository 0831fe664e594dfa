"""Statistics of a model on its own data for merges that weight by data: Fisher information and RegMean.

Both return tensors by the names of the model's parameters. Saved as safetensors, they can be named under
``statistics:`` of a merge.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.continual import require_gradients
from fedtune.errors import DataError
from fedtune.merging import Batch, hook_layer_inputs
from fedtune.merging.combine.fisher import square_gradient
from fedtune.merging.combine.regmean import accumulate_gram

__all__ = ["compute_fisher_information", "compute_input_grams"]


def compute_fisher_information(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradient of the loss, fp32, in the shape of each parameter.

    If the loss is a negative log-likelihood, this is the diagonal of the empirical Fisher information (of the true
    labels). It takes one backward pass per example. The model is left in evaluation mode.
    """
    parameters = {name: one for name, one in model.named_parameters() if one.is_floating_point()}
    sums = {name: torch.zeros(one.shape, device=one.device) for name, one in parameters.items()}
    device = find_device(model)
    count = 0
    model.eval()
    with require_gradients(parameters.values()):
        for example in (example for batch in batches for example in _examples(batch)):
            moved = move_tensors(example, device)
            gradients = torch.autograd.grad(model(**moved).loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += square_gradient(gradient)
            count += 1
    return {name: (total / _require_examples(count)).cpu() for name, total in sums.items()}


def _examples(batch: Batch) -> Iterator[Batch]:
    """Yield batches of one example."""
    for index in range(len(next(iter(batch.values())))):
        yield {name: tensor[index : index + 1] for name, tensor in batch.items()}


@torch.no_grad()
def compute_input_grams(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean x x^T [in, in] over the inputs of each linear layer, fp32, by weight name, without padding.

    Sums are kept in double precision, which takes 16 bytes per entry for the layer being processed. Weights tied to an
    embedding and layers that are never called are left out. The model is left in evaluation mode.
    """
    layers = _linear_layers(model)
    device = find_device(model)
    kept = torch.device("cpu") if device.type == "mps" else device  # MPS has no double precision
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=kept)
        for name, layer in layers.items()
    }
    counts = dict.fromkeys(layers, 0)
    model.eval()

    def add(name: str, rows: Tensor) -> None:
        accumulate_gram(sums[name], rows.to(kept))
        counts[name] += len(rows)

    with hook_layer_inputs({name: (layer, -1) for name, layer in layers.items()}, add) as begin:
        for batch in batches:
            inputs = move_tensors({name: tensor for name, tensor in batch.items() if name != "labels"}, device)
            begin(inputs)
            model(**inputs)
    _require_examples(sum(counts.values()))
    return {name: (total / counts[name]).float().cpu() for name, total in sums.items() if counts[name]}


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    linear = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, nn.Linear)}
    return {
        name: linear[id(parameter)]
        for name, parameter in model.named_parameters()
        if id(parameter) in linear and id(parameter) not in embeddings
    }


def _require_examples(count: int) -> int:
    """Return the count; DataError when it is zero."""
    if not count:
        raise DataError("statistics need at least one batch of examples; give some data")
    return count
