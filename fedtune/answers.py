"""What a device may answer in place of deltas: the codes of Flower's error replies, and how a reason may begin."""

__all__ = ["DECLINED", "FAILED", "TRAINER_DIED"]

FAILED = 2
"""Training raised; Flower's own code for that."""
TRAINER_DIED = 8
"""The process that trained was killed; Flower's own code for that."""
DECLINED = "declined: "
"""How the reason begins when a device did not fail but would not try."""
