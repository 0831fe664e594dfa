"""What coordinates: the Flower ServerApp, the round loop and what it tells whoever watches."""
