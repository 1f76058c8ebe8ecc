"""Accuracy of trackers on the field's data sets: one-pass evaluation, metrics, tables and plots.

The command is ``asymtrack-eval`` (``command.py``); ``docs/evaluation.md`` states which definition of each
metric is used on which data set.
"""

from asymtrack_edge.benchmarks.accuracy.definitions import PROTOCOLS, Protocol
from asymtrack_edge.benchmarks.accuracy.metrics import Summary, summarise

__all__ = ["PROTOCOLS", "Protocol", "Summary", "summarise"]
