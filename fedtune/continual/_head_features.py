"""The features that enter a classifier's last linear layer, and a digest of all that computes them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors, use_autocast
from fedtune.checkpoint import hash_tensors
from fedtune.data import EncodedDataset
from fedtune.errors import ModelError
from fedtune.techniques import Technique, begin_step, list_head_parameters

__all__ = ["find_head_layer", "hash_backbone", "iter_features", "replace_layer"]


def find_head_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the last linear layer of a classifier and its name; ModelError if it has none."""
    inside = set(list_head_parameters(model))
    layers = dict(model.named_modules()).items()
    found = [(name, one) for name, one in layers if isinstance(one, nn.Linear) and f"{name}.weight" in inside]
    if not found:
        raise ModelError(
            f"analytic: {type(model).__name__} does not end in a linear layer, so no head can be computed for it; "
            "choose another model or method"
        )
    return found[-1]


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another module in the place of the named one."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.Sequential):
        owner[int(last)] = layer
    else:
        setattr(owner, last, layer)


@torch.no_grad()
def iter_features(
    model: nn.Module, techniques: Sequence[Technique], examples: EncodedDataset, rows: Sequence[int], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features [n, d] and labels [n] of the examples, on the CPU, without dropout.

    The last layer is taken out meanwhile, so that the model returns what enters it, pooled as it pools its logits.
    """
    device, training = find_device(model), model.training
    model.eval()
    with _take_out_head(model):
        for start in range(0, len(rows), batch_size):
            batch = move_tensors(examples.make_batch(rows[start : start + batch_size]), device)
            labels = batch.pop("labels")
            begin_step(techniques, model, batch, 1.0)
            with use_autocast(model):
                features = model(**batch).logits
            yield features.float().cpu(), labels.cpu()
    model.train(training)


@contextmanager
def _take_out_head(model: nn.Module) -> Iterator[None]:
    name, layer = find_head_layer(model)
    replace_layer(model, name, nn.Identity())
    try:
        yield
    finally:
        replace_layer(model, name, layer)


def hash_backbone(model: nn.Module, state: Mapping[str, Tensor]) -> Tensor:
    """Return the SHA-256 of all tensors but those of the last layer, as 32 bytes; ``state`` replaces the model's."""
    layer, _ = find_head_layer(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {
        name: state[name].to(tensor.dtype) if name in state else tensor.detach().cpu()
        for name, tensor in tensors.items()
        if not name.startswith(f"{layer}.")
    }
    return torch.frombuffer(bytearray.fromhex(hash_tensors(found)), dtype=torch.uint8)
