"""Accuracy of trackers on the field's data sets; the command is ``asymtrack-eval``, the page ``docs/evaluation.md``."""
