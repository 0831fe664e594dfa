"""Continual learning: methods that keep what was learned from earlier tasks of a stream."""
