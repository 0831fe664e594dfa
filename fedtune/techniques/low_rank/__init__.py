"""Techniques that train low-rank pairs beside frozen linear layers."""
