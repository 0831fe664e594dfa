"""Silences reports, retry messages and progress bars while loading and saving. Errors are still raised."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from logging import CRITICAL

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

__all__ = ["silence_transformers"]


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Drop log messages and output on stderr inside the block, and restore the log levels after it."""
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    hub_logging.set_verbosity(CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
