"""LoRA adapters are read, merged and written by their products."""
