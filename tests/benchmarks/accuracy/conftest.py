"""The miniature data sets."""

from tests.datasets.conftest import folder_set

__all__ = ["folder_set"]
