"""Benchmarks of speed, energy and accuracy."""
