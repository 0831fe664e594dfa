"""Federated and continual fine-tuning for constrained devices."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns of an optional package
