"""The processes of a device: the device process, the trainer process, and the ClientApp of a simulation."""
