"""Accuracy of trackers on the field's data sets: readers, one-pass evaluation, metrics, tables and plots.

The command is ``asymtrack-eval`` (``command.py``); ``docs/accuracy.md`` states which definition of each
metric is used on which data set.
"""

from asymtrack_edge.benchmarks.accuracy.definitions import PROTOCOLS, Protocol
from asymtrack_edge.benchmarks.accuracy.metrics import Summary, summarise
from asymtrack_edge.datasets.readers import DATASETS, Dataset, read_dataset
from asymtrack_edge.datasets.sequences import Sequence

__all__ = ["DATASETS", "PROTOCOLS", "Dataset", "Protocol", "Sequence", "Summary", "read_dataset", "summarise"]
