"""Techniques for mobile networks, which consist of inverted residual blocks."""
