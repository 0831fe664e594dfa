"""Turns the exceptions of transformers for a source that cannot be loaded into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from fedtune.errors import SourceError

__all__ = ["explain_load_errors"]


@contextmanager
def explain_load_errors(source: str) -> Iterator[None]:
    """Raise SourceError with one sentence when transformers cannot load ``source``."""
    try:
        yield
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        raise SourceError(f"cannot load {source}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what went wrong and how to fix it, from the first known exception in the chain."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    for kind, reason in _REASONS.items():
        if kind in kinds:
            return reason
    return " ".join(str(error).split("\n")[0].split()).rstrip(".:")


_REASONS = {
    "GatedRepoError": "it is gated; ask for access on its page and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is private; check the id",
    "RevisionNotFoundError": "the hub has no such revision; check the id",
    "LocalEntryNotFoundError": "the hub cannot be reached and the cache does not have it; check the network",
    "OfflineModeIsEnabled": "the hub is switched off by HF_HUB_OFFLINE and the cache does not have it; go online",
    "ConnectError": "the hub cannot be reached; check the network",
    "SafetensorError": "a weight file is cut short or damaged; fetch it again",
}
