"""Invalid or damaged input to the runtime: frames, boxes, manifests, export directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asymtrack_edge.errors import BoxError, ManifestError
from asymtrack_edge.geometry import check_box, clip_box
from asymtrack_edge.manifest import load_manifest, read_networks
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.sources.clip import synthetic_clip

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
anything = scalars | st.lists(st.integers(), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(st.floats(), min_size=4, max_size=4), st.lists(anything, max_size=6), anything))
def test_any_box_is_refused_or_can_be_followed(box: Any) -> None:
    try:
        checked = check_box(box, (240, 320, 3))
    except BoxError as error:
        assert str(error)
    else:
        assert np.isfinite(clip_box(checked, (240, 320, 3))).all()


FRAMES = [frame for frame, _ in synthetic_clip(6, (200, 160))]


def test_frames_of_any_size_layout_and_lifetime() -> None:
    """Resized between updates, strided views, read-only memory, two columns of pixels."""
    tracker = Tracker.load("T", threads=1)
    tracker.init(FRAMES[0], (60, 50, 32, 32))
    big = np.random.RandomState(0).randint(0, 256, (700, 900, 3)).astype(np.uint8)
    locked = big[:300, :400].copy()
    locked.flags.writeable = False
    for frame in (big, big[::2, ::3], big[:, ::-1], big[..., ::-1], locked, big[:2, :2], big[:700, :2], big):
        assert tracker.update(frame).box.x < frame.shape[1]


def test_export_directory_may_change_while_it_is_in_use(batch_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(batch_model, tmp_path / "export"))
    clean, used = (MultiTracker.load(path, threads=2) for path in (batch_model, folder))
    for tracker in (clean, used):
        tracker.add(FRAMES[0], (60, 50, 32, 32))
    (folder / "search.onnx").write_bytes(b"something else")
    for tracker in (clean, used):
        tracker.add(FRAMES[0], (20, 50, 32, 32))  # opens the search network once more
    assert used.update(FRAMES[1]) == clean.update(FRAMES[1])
    with pytest.raises(ManifestError, match="is not the file"):
        Tracker.load(folder)
    (folder / "search.onnx").unlink()
    with pytest.raises(ManifestError, match="missing"):
        Tracker.load(folder)
    shutil.rmtree(folder)
    for tracker in (clean, used):
        tracker.add(FRAMES[1], (60, 50, 32, 32))
    assert used.update(FRAMES[2]) == clean.update(FRAMES[2])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_manifests_are_refused_with_one_line(data: Any, batch_model: Path, tmp_path: Path) -> None:
    """In a real manifest, any value is replaced or removed, or the text is cut off."""
    text = (batch_model / "manifest.json").read_text()
    content = json.loads(text)
    for key in ("how_to", "provenance", "verification"):
        content.pop(key)
    node: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        if not isinstance(node[key], (dict, list)) or not node[key] or not data.draw(st.booleans()):
            break
        node = node[key]
    if data.draw(st.booleans()):
        node[key] = data.draw(anything)
    else:
        del node[key]
    text = json.dumps(content)
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    (tmp_path / "manifest.json").write_text(text)
    try:
        read_networks(tmp_path, load_manifest(tmp_path))
    except ManifestError as error:
        assert "\n" not in str(error)
