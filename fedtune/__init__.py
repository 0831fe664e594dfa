"""Federated and continual fine-tuning for constrained devices."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns of an optional package in every process
