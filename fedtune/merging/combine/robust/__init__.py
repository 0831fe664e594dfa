"""Merges that a minority of hostile or broken models cannot move far."""
