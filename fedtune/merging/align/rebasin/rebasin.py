"""Re-basin: permute the hidden units of each model so that they correspond to those of the others.

What: finds pi_k so that pi_k(theta_k) is close to theta_1. The permuted model computes the same function. ``method:
weight`` is coordinate descent on sum <theta_1, pi(theta_k)>, with one linear assignment per layer and step; it takes
the best of ``restarts`` random orders of layers. ``method: activation`` solves an assignment on the correlations of
units, measured on calibration data. ``reference: first`` matches all models to the first one. ``reference:
mean-of-others`` matches each model in turn to the mean of the others, until none changes (MergeMany).
Fits: nets of linear and convolutional layers, plain or residual, with any norm; BERT, RoBERTa, GPT-2 and Llama-like
models. Attention heads move as a whole. With rotary positions, the channels of queries and keys stay in place.
Memory: one tensor of each of two models at a time and C in double precision; afterwards one whole tensor per model.
``method: activation`` holds two models and the inputs of their layers for one batch.
Use when: models have different starts, or were trained separately for long. Use weight for wide multi-layer perceptrons
and activation for narrow convolutional nets. Renormalise afterwards (repair, or reset if there are batch norms).
Avoid when: all models start from one model and stay close to it. Matching then finds the order they already have; a
gain below 1 % changes nothing. Language models from different starts keep large barriers.
Source: Ainsworth et al. (arXiv 2209.04836), algorithms 1 and 3; Qu & Horvath (arXiv 2402.05966) for the correlations.
Deviations: running statistics do not count in C. The cycle starts from the orders found so far.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging._step import AlignStep, MergeContext, MergeInput
from fedtune.merging.align.rebasin._activation_matching import ActivationComparison, match_activations
from fedtune.merging.align.rebasin._architecture_tables import build_spec_from_tables, has_architecture_table
from fedtune.merging.align.rebasin._graph_tracing import trace_permutation_spec
from fedtune.merging.align.rebasin._many_models import MatchFunction, match_in_cycles, match_to_first
from fedtune.merging.align.rebasin._permutations import Permutations, PermutationSpec
from fedtune.merging.align.rebasin._permuted_delta import PermutedDelta, make_tensor_reader
from fedtune.merging.align.rebasin._weight_matching import TensorReader, match_weights

__all__ = ["Rebasin"]

_LEAST_GAIN = 0.01


class Rebasin(AlignStep):
    """Permutes the units by weight matching or activation matching."""

    name: ClassVar[str] = "rebasin"
    method: Literal["weight", "activation"] = "weight"
    similarity: Literal["pearson", "inner"] = Field("pearson", description="similarity of activations")
    reference: Literal["first", "mean-of-others"] = "first"
    restarts: int = Field(3, ge=1, description="number of random orders of layers to try; the best is used")
    max_sweeps: int = Field(100, ge=1, description="largest number of passes over the layers and of cycle rounds")

    @property
    def needs(self) -> frozenset[str]:
        """The model, and data for ``method: activation``."""
        return frozenset({"model"} if self.method == "weight" else {"model", "batches"})

    def align(
        self, base: Mapping[str, Tensor], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> list[MergeInput]:
        """Inputs with the deltas between the base and the permuted models."""
        if context.model is None or (self.method == "activation" and not context.calibration_batches):
            raise ModelError(f"rebasin: method {self.method} needs {' and '.join(sorted(self.needs))}; give them")
        if len(merge_inputs) < 2:
            return list(merge_inputs)
        net = context.model.eval()
        symmetry = build_spec_from_tables(net) if has_architecture_table(net) else trace_permutation_spec(net)
        symmetry.check_shapes({name: tuple(tensor.shape) for name, tensor in base.items()})
        symmetry = symmetry.restrict_to(base.keys())
        moved = frozenset(symmetry.list_permuted_tensors())
        models = [make_tensor_reader(base, merge_input, moved) for merge_input in merge_inputs]
        match = self._make_match_function(symmetry, context)
        orders = (
            match_to_first(match, symmetry, models)
            if self.reference == "first"
            else match_in_cycles(match, symmetry, models, self.max_sweeps)
        )
        return [
            merge_input if _is_identity(symmetry, order) else _permute_input(symmetry, order, base, merge_input)
            for merge_input, order in zip(merge_inputs, orders, strict=True)
        ]

    def _make_match_function(self, symmetry: PermutationSpec, context: MergeContext) -> MatchFunction:
        """A function that matches one model to another; it returns the orders it started from if the gain is small."""

        def match(reference: TensorReader, model: TensorReader, start: Permutations) -> Permutations:
            if self.method == "weight":
                found = match_weights(symmetry, reference, model, start, visits=self.restarts, sweeps=self.max_sweeps)
            else:
                assert context.model is not None
                comparison = ActivationComparison(context.model, context.calibration_batches, self.similarity)
                found = match_activations(symmetry, reference, model, start, comparison)
            orders, before, after = found
            return orders if after - before >= _LEAST_GAIN * abs(before) else start

        return match


def _permute_input(
    symmetry: PermutationSpec, orders: Permutations, base: Mapping[str, Tensor], merge_input: MergeInput
) -> MergeInput:
    if merge_input.statistics is not None:
        raise ModelError(
            "rebasin: what was measured on a model no longer fits once it is permuted; leave one of them out"
        )
    return merge_input._replace(read_rows=PermutedDelta(symmetry, orders, base, merge_input))


def _is_identity(symmetry: PermutationSpec, orders: Permutations) -> bool:
    still = symmetry.build_identity()
    return all(bool((orders[name][part] == at).all()) for name, parts in still.items() for part, at in parts.items())
