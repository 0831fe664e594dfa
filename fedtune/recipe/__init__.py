"""All settings of a run, and every check of them."""
