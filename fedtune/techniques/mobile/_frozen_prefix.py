"""Run the frozen first part of a network without a graph, in micro-batches, so that few large maps exist at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedtune.techniques._layers.layer_replacement import ForwardOverride
from fedtune.techniques.mobile._output_cache import OutputCache

__all__ = ["run_frozen_prefix"]


def run_frozen_prefix(model: nn.Module, names: Sequence[str], micro_batch_size: int, *, cache_outputs: bool) -> None:
    """Let the first of the named modules run all of them, ``micro_batch_size`` examples at a time.

    The other modules return their input. With ``cache_outputs``, outputs are stored on disk and never computed twice.
    """
    modules = [model.get_submodule(name) for name in names]
    if modules:
        kept = OutputCache.for_modules(modules) if cache_outputs else None
        _Prefix(modules, micro_batch_size, kept).install(modules[0])
    for module in modules[1:]:
        _PassThrough().install(module)


class _Prefix(ForwardOverride):
    """Runs the modules one after the other, with the ``forward`` that each of them had."""

    def __init__(self, modules: Sequence[nn.Module], rows: int, kept: OutputCache | None) -> None:
        self.modules, self.rows, self.kept = modules, rows, kept
        self.others = [vars(module).get("forward") for module in modules]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Pixels [n, 3, h, w] -> [n, c, h', w']."""
        run = self._run if self.kept is None else self._run_or_read
        return torch.cat([run(piece) for piece in x.split(self.rows)])

    def _run(self, x: Tensor) -> Tensor:
        """Always in evaluation mode: no dropout, no batch statistics."""
        for module, other in zip(self.modules, self.others, strict=True):
            module.eval()
            x = type(module).forward(module, x) if other is None else other(x)
        return x

    def _run_or_read(self, x: Tensor) -> Tensor:
        assert self.kept is not None
        found = self.kept.read_output(x)
        if found is None:
            found = self._run(x)
            self.kept.write_output(x, found)
        return found


class _PassThrough(ForwardOverride):
    """A module that the prefix has run already."""

    def __call__(self, x: Tensor) -> Tensor:
        """Its input."""
        return x
