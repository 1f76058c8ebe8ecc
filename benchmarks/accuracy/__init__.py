"""Accuracy of trackers on public data sets: the command ``asymtrack-eval``, explained in ``docs/evaluation.md``."""
