"""What runs on a device: the Flower ClientApp."""
