"""Everything fedtune refuses, as one tree. Each message is one sentence: what is wrong, where, and the mend.

FedtuneError
├── RecipeError          a recipe, an override or a setting that does not hold
├── SourceError          a model or data source that cannot be fetched, read or trusted
│   └── ChecksumError    bytes that are not the ones that were published
├── DataError            examples that do not fit the task or the split
├── ModelError           a model that does not fit the task or a technique
├── ContributionError    what a client sent cannot be merged
├── RoundError           a federation that cannot go on
├── ServerError          a server that cannot be made, reached or asked this
├── DeviceError          a device that cannot be enrolled, joined or asked
│   └── BudgetError      a round that a device's memory cannot hold
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
    "RecipeError",
    "RunError",
    "ServerError",
    "SourceError",
    "StoreError",
]


class FedtuneError(Exception):
    """The root: the command line prints its message and ends with code 2.

    ``code`` and ``counts`` are what a device may tell its server of the error, see :mod:`fedtune.protocol_codes`; the
    message, which may quote the device's data, stays on the device.
    """

    def __init__(self, message: str = "", *, code: str = "", counts: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.counts = dict(counts or {})


class FedtuneWarning(UserWarning):
    """What goes on but should be known: one sentence, as an error is."""


class RecipeError(FedtuneError):
    """A recipe, an override or a setting that does not hold."""


class SourceError(FedtuneError):
    """A model or data source that cannot be fetched, read or trusted."""


class ChecksumError(SourceError):
    """Bytes that are not the ones that were published."""


class DataError(FedtuneError):
    """Examples that do not fit the task or the split."""


class ModelError(FedtuneError):
    """A model that does not fit the task or a technique."""


class ClientUpdateError(FedtuneError):
    """What a client sent cannot be merged."""


class DeviceError(FedtuneError):
    """A device that cannot be enrolled, joined or asked."""


class MemoryBudgetError(DeviceError):
    """A round that a device's memory cannot hold."""


class RunError(FedtuneError):
    """A federation that cannot go on."""


class ServerError(FedtuneError):
    """A server that cannot be made, reached or asked this."""


class StoreError(FedtuneError):
    """The run store or a checkpoint cannot be read or written."""
