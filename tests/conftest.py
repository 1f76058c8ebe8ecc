"""Miniature data sets."""

from __future__ import annotations

import pytest

from tests.datasets.miniature import drift, save, write_frames


@pytest.fixture
def folder_set(tmp_path):
    """Three sequences a, b, c of 6, 5 and 4 frames in GOT-10k's layout; the frames of b are black.

    A box that moves by one pixel per frame follows a and b exactly, but not c.
    """
    root = tmp_path / "set"
    for name, count, value, step in (("a", 6, 90, 1), ("b", 5, 0, 1), ("c", 4, 90, -3)):
        write_frames(root / name, count, value=value)
        save(root / name / "groundtruth.txt", drift(count, x=12, step=step))
    return root
