"""The base weights of the last rounds that a device trained in: files named by their digest, so that none is mistaken.

Merges that write into the base send only what was added to it. A device adds this to the base it holds and gets the
server's bits, or asks for the whole base. Two files stay: the one that the request counted on, which a round that is
begun again will count on too, and the one that it led to.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fedtune import checkpoint, techniques
from fedtune.errors import DeviceError, StoreError
from fedtune.merging import add_increments, split_increments
from fedtune.training import RunContext, named_tensors, precise
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.protocol_codes import LACKS_BASE
from fedtune.wire.stored_state import StoredState

__all__ = ["leave_others", "with_base"]

State = Mapping[str, Tensor]


def with_base(request: TrainRequest, sent: State, context: RunContext, folder: Path) -> State:
    """The state of an request with its base weights whole, which are kept in ``folder`` for the next one.

    DeviceError with the code ``base-lacking`` where the device does not hold what the request counts on.
    """
    if request.base_digest is None:
        return sent
    transposed = {
        pair.base: pair.transposed
        for pair in techniques.list_low_rank_pairs(context.techniques, context.model)
        if pair.base
    }
    rest, steps = split_increments(sent)
    if request.held_digest is None:
        base = {name: rest.pop(name) for name in transposed}
    else:
        held = _held(request.held_digest, list(transposed), context, folder)
        base = {name: add_increments(held[name], name, steps, turned) for name, turned in transposed.items()}
        if checkpoint.hash_tensors(base) != request.base_digest:
            raise _lacking()
    kept = _keep(request.base_digest, base, folder)
    _forget_all_but({digest for digest in (request.held_digest, request.base_digest) if digest}, folder)
    return ChainMap(rest, kept)  # type: ignore[arg-type]  # nobody writes into it


def leave_others(folder: Path) -> None:
    """Drop the base weights kept for other runs, whose folders lie beside this one's."""
    for path in folder.parent.glob("*/base-*.safetensors"):
        if path.parent != folder:
            path.unlink(missing_ok=True)


def _held(digest: str, names: Sequence[str], context: RunContext, folder: Path) -> State:
    """The base with this digest, from its file or, before the first round, from the model as it was built.

    What the model holds is kept too: once it has trained it is another one.
    """
    with suppress(StoreError):
        return StoredState(_path(folder, digest))
    tensors = named_tensors(context.model)
    built = {name: precise(tensors[name].detach()) for name in names}
    if checkpoint.hash_tensors(built) != digest:
        raise _lacking()
    return _keep(digest, built, folder)


def _keep(digest: str, base: State, folder: Path) -> State:
    """The base, from its file; from memory where the disk is full: then the next request's is asked for whole."""
    path = _path(folder, digest)
    with suppress(StoreError):
        if not path.exists():
            checkpoint.write_checkpoint(path, base)
        return StoredState(path)
    return base


def _forget_all_but(digests: set[str], folder: Path) -> None:
    kept = {_path(folder, digest) for digest in digests}
    for path in folder.glob("base-*.safetensors"):
        if path not in kept:
            path.unlink(missing_ok=True)


def _path(folder: Path, digest: str) -> Path:
    return folder / f"base-{digest}.safetensors"


def _lacking() -> DeviceError:
    return DeviceError("these base weights are not on this device; it asks for them whole", code=LACKS_BASE)
