"""Steps that scale a merged delta."""
