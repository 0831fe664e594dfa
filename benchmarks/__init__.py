"""One script per claim; each docstring says what is claimed, how it is measured and how to run it."""
