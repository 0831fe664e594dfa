"""Server optimisers take the merged change as a gradient. At most one is the last step of a merge."""
