"""DEFT: sparse activations of MLPs."""
