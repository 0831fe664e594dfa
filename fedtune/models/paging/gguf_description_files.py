"""The files of a GGUF file's description in the cache."""

__all__ = ["MATRICES", "SMALL"]

MATRICES, SMALL = "matrices.json", "small.safetensors"
"""The places of the matrices, and all other tensors."""
