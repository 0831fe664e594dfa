"""Sampling of tokens with a random number generator per text, so that no text depends on the others of its batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from fedtune.recipe.evaluation_settings import GenerationSettings

__all__ = ["make_sampler"]


def make_sampler(settings: GenerationSettings, seeds: Sequence[int]) -> LogitsProcessorList:
    """Turn logits into scores whose largest entry is the sampled token; empty if generation is greedy."""
    if not settings.temperature:
        return LogitsProcessorList()
    warped = [TemperatureLogitsWarper(settings.temperature)]
    chosen = [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
    return LogitsProcessorList([_Doubled(), *warped, *chosen, _GumbelNoise(seeds)])


class _Doubled(LogitsProcessor):
    """Double precision where the device has it: a small temperature overflows half precision."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() if scores.device.type == "mps" else scores.double()


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise: the largest sum is a sample from the softmax of the logits."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [_draw_gumbel(scores.shape[-1], generator) for generator in self._generators]
        return scores + torch.stack(noise).to(scores)


def _draw_gumbel(count: int, generator: torch.Generator) -> Tensor:
    return -torch.empty(count, dtype=torch.float64).exponential_(generator=generator).log()
