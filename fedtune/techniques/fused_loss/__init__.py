"""Techniques that compute a loss without storing all logits."""
