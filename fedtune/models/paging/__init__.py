"""Frozen weights that stay in a file: a layer reads its matrix each time it multiplies, forward and backward."""
