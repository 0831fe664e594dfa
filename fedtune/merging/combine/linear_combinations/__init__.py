"""Steps with one coefficient per model, computed from weights and inner products of deltas."""
