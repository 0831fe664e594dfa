"""Steps that merge both factors of low-rank pairs."""
