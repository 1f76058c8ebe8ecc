"""Readers of the published data sets, for training and for evaluation."""

from asymtrack_edge.datasets.readers import DATASETS, Dataset
from asymtrack_edge.datasets.sequences import Sequence

__all__ = ["DATASETS", "Dataset", "Sequence"]
