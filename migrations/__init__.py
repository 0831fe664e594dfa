"""The history of the run store's schema; ``python -m migrations TEXT`` begins the next revision."""
