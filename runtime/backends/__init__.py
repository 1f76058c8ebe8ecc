"""The backends that run the networks: one per inference runtime."""
