"""The base weights of the last rounds in which a device trained, in files named by their digest.

After merges that write into the base weights, the server sends only the increments. The device adds them to the base
weights that it holds and gets the same bits as the server. If it does not hold them, it requests all base weights. Two
files are kept: the base weights that the last request started from, which a repeated round needs again, and the result.
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
    """Return the state of a train request with all base weights, and save these in ``folder`` for the next request.

    Raise DeviceError with the code ``base-lacking`` if the device does not hold the base weights of ``held_digest``.
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
    return ChainMap(rest, kept)  # type: ignore[arg-type]  # it is only read


def leave_others(folder: Path) -> None:
    """Delete the base weights of other runs, whose folders are beside ``folder``."""
    for path in folder.parent.glob("*/base-*.safetensors"):
        if path.parent != folder:
            path.unlink(missing_ok=True)


def _held(digest: str, names: Sequence[str], context: RunContext, folder: Path) -> State:
    """Return the base weights with this digest from their file or, before the first round, from the untrained model.

    The weights of the untrained model are saved too, because training changes the model.
    """
    with suppress(StoreError):
        return StoredState(_path(folder, digest))
    tensors = named_tensors(context.model)
    built = {name: precise(tensors[name].detach()) for name in names}
    if checkpoint.hash_tensors(built) != digest:
        raise _lacking()
    return _keep(digest, built, folder)


def _keep(digest: str, base: State, folder: Path) -> State:
    """Write the base weights and return them from the file.

    If the disk is full, they are returned from memory, and the next request needs all base weights.
    """
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
    return DeviceError("these base weights are not on this device; it requests all of them", code=LACKS_BASE)
