"""The server: the Flower ServerApp, the round loop and its events, the gateway, and the management of runs."""
