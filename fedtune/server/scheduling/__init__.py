"""Round schedulers decide which clients train and when a round ends."""
