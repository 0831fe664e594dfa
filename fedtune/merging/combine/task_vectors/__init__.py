"""Steps that sparsify the deltas before they add them."""
