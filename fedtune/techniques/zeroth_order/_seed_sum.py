"""Trained tensors as a sum over fixed directions: w = w_0 + sum_k a_k z_k. Only the scalars a [K] are state.

z_k is drawn from the k-th seed, w_0 are the values before training, and terms are added in the order of k. The weights
therefore have the same bits wherever they are rebuilt from the same scalars, whatever happened before.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.seeds import derive_seed
from fedtune.techniques.zeroth_order._directions import TrainedTensor, move_weights

__all__ = [
    "SeedSum",
    "expand_seed_sum",
    "find_seed_sum",
    "list_coefficients",
    "list_rebuilt_tensors",
    "rebuild_weights",
    "remove_seed_sum",
]

_MODULE = "fedkseed"


class SeedSum(nn.Module):
    """The scalars of a model, the seeds of their directions, and the values that the sum begins with.

    It is a child of the model without parameters. The scalars are a buffer of its state, the values are not.
    """

    coefficients: Tensor

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        self.seeds = [derive_seed(seed, "candidate", number) for number in range(count)]
        self.names: list[str] = []
        self.register_buffer("coefficients", torch.zeros(count))

    def take_trained(self, model: nn.Module) -> None:
        """Freeze what other techniques train, which from now on is the sum. Nothing happens the second time."""
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        for name in sorted(trained):
            if trained[name].dtype != torch.float32:
                used = str(trained[name].dtype).removeprefix("torch.")
                raise ModelError(
                    f"fedkseed adds thousands of small terms to {name}, which {used} would lose in rounding; set "
                    "model.dtype: float32, or train lora"
                )
            trained[name].requires_grad_(False)
            self.register_buffer(f"base_{len(self.names)}", trained[name].detach().clone(), persistent=False)
            self.names.append(name)

    def list_trained(self, model: nn.Module) -> list[TrainedTensor]:
        """Return the weights that the sum is written to, in the order of their names."""
        return [TrainedTensor(model.get_parameter(name).detach()) for name in self.names]

    def write_weights(self, model: nn.Module) -> None:
        """Write the sum into the weights, one direction at a time."""
        trained = self.list_trained(model)
        for number, one in enumerate(trained):
            one.value.copy_(self.get_buffer(f"base_{number}"))
        for seed, coefficient in zip(self.seeds, self.coefficients.tolist(), strict=True):
            if coefficient:
                move_weights(trained, seed, coefficient)


def find_seed_sum(model: nn.Module) -> SeedSum | None:
    """Return the sum that a model's weights are, or None."""
    found = dict(model.named_children()).get(_MODULE)
    return found if isinstance(found, SeedSum) else None


def attach_seed_sum(model: nn.Module, count: int, seed: int) -> None:
    """Let a model have a sum of ``count`` directions."""
    model.add_module(_MODULE, SeedSum(count, seed))


def list_coefficients(model: nn.Module) -> list[str]:
    """Return the name of the scalars among the model's tensors, if its weights are a sum."""
    return [] if find_seed_sum(model) is None else [f"{_MODULE}.coefficients"]


def list_rebuilt_tensors(model: nn.Module) -> list[str]:
    """Return the names of the weights that are rebuilt, and in no shared state."""
    found = find_seed_sum(model)
    return [] if found is None else list(found.names)


@torch.no_grad()
def rebuild_weights(model: nn.Module, written: Sequence[str]) -> None:
    """Rebuild the weights if the scalars are among the tensors that were written."""
    found = find_seed_sum(model)
    if found is not None and set(list_coefficients(model)) & set(written):
        found.write_weights(model)


def expand_seed_sum(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the weights that were rebuilt from it in the place of the scalars."""
    rebuilt = {name: model.get_parameter(name).detach().clone() for name in list_rebuilt_tensors(model)}
    scalars = list_coefficients(model)
    return {name: one for name, one in state.items() if name not in scalars} | rebuilt


def remove_seed_sum(model: nn.Module) -> None:
    """Leave the weights as they are, as plain values."""
    delattr(model, _MODULE)
