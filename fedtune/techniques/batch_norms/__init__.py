"""Techniques that train batch norms."""
