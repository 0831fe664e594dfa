"""Techniques that recompute activations in the backward pass."""
