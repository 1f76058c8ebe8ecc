"""Readers of the published data sets, for training and for evaluation."""
