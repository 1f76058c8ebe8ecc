"""What computes the networks: one backend per inference runtime."""
