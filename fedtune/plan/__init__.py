"""Predicts the memory and the cost of a training step without training, and chooses settings for a memory budget."""
