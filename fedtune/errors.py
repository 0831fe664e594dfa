"""All errors of fedtune form one tree. A message states in one sentence what is wrong, where, and how to fix it.

FedtuneError
├── RecipeError          a recipe, an override or a setting is invalid
├── SourceError          a model or data source cannot be fetched, read or trusted
│   └── ChecksumError    the checksum of a download is wrong
├── DataError            examples do not fit the task or the partition
├── ModelError           a model does not fit the task or a technique
├── ClientUpdateError    a client update cannot be merged
├── RunError             a run cannot continue
├── ServerError          a server cannot be created or reached, or refuses a request
├── DeviceError          a device cannot be enrolled or joined, or cannot answer
│   ├── MemoryBudgetError  a training step does not fit the memory budget of a device
│   └── NoTaskError        a device has nothing to train in a round of a stream
└── StoreError           the run store or a checkpoint cannot be read or written
"""

from collections.abc import Mapping

__all__ = [
    "ChecksumError",
    "ClientUpdateError",
    "DataError",
    "DeviceError",
    "FedtuneError",
    "FedtuneWarning",
    "MemoryBudgetError",
    "ModelError",
    "NoTaskError",
    "RecipeError",
    "RunError",
    "ServerError",
    "SourceError",
    "StoreError",
    "UnexpectedReplyError",
]


class FedtuneError(Exception):
    """The root of the tree. The command line prints the message and exits with code 2.

    A device sends only ``code`` and ``counts`` of an error to its server, see :mod:`fedtune.wire.protocol_codes`. The
    message stays on the device, because it may quote the device's data.
    """

    def __init__(self, message: str = "", *, code: str = "", counts: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.counts = dict(counts or {})


class FedtuneWarning(UserWarning):
    """A warning: fedtune continues. Its message is one sentence, like that of an error."""


class RecipeError(FedtuneError):
    """A recipe, an override or a setting is invalid."""


class SourceError(FedtuneError):
    """A model or data source cannot be fetched, read or trusted."""


class ChecksumError(SourceError):
    """The checksum of a download is wrong."""


class DataError(FedtuneError):
    """Examples do not fit the task or the partition."""


class ModelError(FedtuneError):
    """A model does not fit the task or a technique."""


class ClientUpdateError(FedtuneError):
    """A client update cannot be merged."""


class DeviceError(FedtuneError):
    """A device cannot be enrolled or joined, or cannot answer."""


class MemoryBudgetError(DeviceError):
    """A training step does not fit the memory budget of a device."""


class NoTaskError(DeviceError):
    """A device has nothing to train in a round of a stream. It declines, and the round goes on."""


class RunError(FedtuneError):
    """A run cannot continue."""


class ServerError(FedtuneError):
    """A server cannot be created or reached, or refuses a request."""


class StoreError(FedtuneError):
    """The run store or a checkpoint cannot be read or written."""


class UnexpectedReplyError(Exception):
    """A reply does not follow the protocol: the server is another program or has another version."""
