"""Layers that replace those of a model, and functions that replace and restore layers."""
