"""Replacing an export directory as a whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from asymtrack_edge.errors import ExportError
from asymtrack_edge.manifest import is_export


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Gives a new directory beside ``target`` that takes its place when the block ends well.

    If the block raises, the new directory is removed and ``target`` stays as it was. Two processes
    that write to the same target take turns at the exchange; the later one's directory stays.

    Raises:
        ExportError: ``target`` is something that an export must not replace, or cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under the lock: while another process exchanges the directory, it is neither here nor there.
        with _lock(target):
            replaceable = _replaceable(target)
        if not replaceable:
            raise ExportError(f"{target} exists and is no export directory: choose another --output")
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror}") from None
    try:
        yield beside
        beside.chmod(0o755)
        with _lock(target):
            _exchange(beside, target)
    except OSError as error:
        # What the caller did elsewhere is not this directory's fault.
        elsewhere = error.filename is not None and beside not in (Path(error.filename), *Path(error.filename).parents)
        place = error.filename if elsewhere else target
        raise ExportError(f"cannot write {place}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replaceable(target: Path) -> bool:
    """Whether ``target`` is free, empty, or an export."""
    if not target.exists():
        return True
    # Others have files of that name too: web pages, browser extensions.
    return target.is_dir() and (is_export(target) or not any(target.iterdir()))


def _exchange(new: Path, target: Path) -> None:
    """Puts ``new`` in ``target``'s place; the old directory is removed afterwards."""
    old = new.with_name(new.name + "-old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
