"""Codes of Flower's error replies and the prefix and header that devices use."""

__all__ = ["DECLINED_PREFIX", "REFUSED", "STORED_MESSAGE_HEADER", "TRAINER_DIED", "TRAINING_FAILED"]

TRAINING_FAILED = 2
"""Training raised an exception. This is Flower's own code."""
TRAINER_DIED = 8
"""The training process was killed. This is Flower's own code."""
REFUSED = 1001
"""The server rejected a reply. This code is fedtune's; Flower's codes are far smaller."""
DECLINED_PREFIX = "declined: "
"""The prefix of the reason when a device declined a request without trying it."""
STORED_MESSAGE_HEADER = "fedtune-held"
"""The header with the id of the message that a device has stored on disk; empty when there is none."""
