"""MEFT: reversible transformer blocks."""
