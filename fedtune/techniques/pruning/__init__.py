"""Techniques that prune stored activations or weights."""
