"""Steps that permute the units of models so that they correspond."""
