"""What a device tells beside deltas: codes of Flower's error replies, how a reason may begin, what it holds."""

__all__ = ["DECLINED_PREFIX", "REFUSED", "STORED_MESSAGE_HEADER", "TRAINER_DIED", "TRAINING_FAILED"]

TRAINING_FAILED = 2
"""Training raised; Flower's own code for that."""
TRAINER_DIED = 8
"""The process that trained was killed; Flower's own code for that."""
REFUSED = 1001
"""The server's own code, in place of a reply that it did not take; Flower's end far below."""
DECLINED_PREFIX = "declined: "
"""How the reason begins when a device did not fail but would not try."""
STORED_MESSAGE_HEADER = "fedtune-held"
"""The header that names the message a device has on its disk, and is empty when there is none."""
