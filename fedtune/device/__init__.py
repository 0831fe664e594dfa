"""What runs on a device: its own light process, the resident trainer, and the ClientApp of a simulation."""
