"""Model readers return rows of one model, whatever format it is stored in."""
