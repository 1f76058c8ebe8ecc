"""User files: outputs that do not damage existing files, and inputs with any name.

Commands write through ``OutputFile``. Every path that reaches OpenCV goes through ``opencv_path``,
``open_video`` or ``read_image``: OpenCV crashes on names that are not UTF-8, takes the text before a
colon for a protocol, and a ``%`` for the pattern of an image sequence.
"""

from __future__ import annotations

import codecs
import fcntl
import logging
import os
import re
import shutil
import stat
import threading
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import ContextManager, Iterator, List, Optional, Tuple, Type, Union

import cv2
import numpy as np

from asymtrack_edge.errors import DatasetError, SourceError, UsageError

AnyPath = Union[str, "os.PathLike[str]"]
# Other packets (sound, telemetry) between two frames of a video, after which OpenCV reports an unreadable frame.
os.environ.setdefault("OPENCV_FFMPEG_READ_ATTEMPTS", "100000")  # its own: 4096, the sound of 90 seconds

#: Suffixes of image files, in lower case.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def check_output(path: AnyPath) -> None:
    """Raises ``UsageError`` if ``path`` cannot be written, so that this is known before the work. Creates nothing."""
    name = printable(path)
    # A file written through a dangling link appears where the link points.
    folder, base = os.path.split(os.path.realpath(path))
    if os.path.isdir(path):
        raise UsageError(f"{name} is a folder: name a file in it")
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {printable(folder)} to write {name} into")
    if len(os.fsencode(base)) > os.pathconf(folder, "PC_NAME_MAX"):
        raise UsageError(f"cannot write {name}: the name is too long")
    if descriptor_of(path) is None and not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"cannot write {name}: permission denied")


def check_folder(path: AnyPath) -> None:
    """Raises ``UsageError`` if nothing can be written into the folder ``path``; see ``check_output``."""
    place = os.path.realpath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
        raise UsageError(f"cannot write into {printable(path)}: {printable(place)} is not a writable folder")


class OutputFile(ContextManager["OutputFile"]):
    """A file being written; as a context manager, it leaves nothing behind after an error.

    A new file, or one that replaces a plain regular file of this user, is written under another name in
    the same folder and renamed when complete, with the earlier file's mode: until then the earlier file
    stays. Anything else (a device, a FIFO, a link, a file with several hard links, another user's file, a
    mounted file) is written in place, so that it stays what it is; the first write drops its old content.

    Attributes:
        path: where the complete file is found.
        place: where it is written until then, for encoders that open a file by name.

    Raises:
        UsageError: it cannot be written (see ``check_output``).
    """

    def __init__(self, path: AnyPath) -> None:
        check_output(path)
        self.path = self.place = Path(path)
        self._size = 0
        self._closed = False
        self._beside = _replaceable(self.path)
        self._created = self._beside or not self.path.exists()
        try:
            if self._beside:
                self._descriptor, self.place = _create_beside(self.path)
            else:
                self._descriptor = _open_straight(self.path)
        except OSError as error:
            raise UsageError(f"cannot write {printable(path)}: {error.strerror}") from None
        # Standard output may be a regular file too, but its earlier text is not ours to remove.
        self._regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode) and descriptor_of(self.path) is None

    def write(self, data: bytes) -> None:
        """Appends ``data`` unbuffered; to a regular file as a whole or not at all.

        Raises:
            OSError: the disk is full or gone, or a FIFO has lost its reader.
        """
        rest = memoryview(data)
        try:
            if self._regular and not self._size:
                os.ftruncate(self._descriptor, 0)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            if self._regular:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
                    os.lseek(self._descriptor, self._size, os.SEEK_SET)
            error.filename = printable(self.path)
            raise
        self._size += len(data)

    def check_growth(self) -> None:
        """Raises ``OSError`` if a regular file cannot grow by a byte: its writer may then have lost data."""
        if self._regular:
            size = os.fstat(self._descriptor).st_size
            try:
                os.pwrite(self._descriptor, b"\0", size)
            except OSError as error:
                error.filename = printable(self.path)
                raise
            os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        """Completes the file and moves it to its place. Safe to call twice."""
        if self._release() and self._beside:
            try:
                os.replace(self.place, self.path)
            except OSError:  # a file of the same device is mounted there
                try:
                    shutil.copyfile(self.place, self.path)
                    os.unlink(self.place)
                except OSError as error:
                    error.filename = str(self.place)
                    raise

    def discard(self) -> None:
        """Drops the file; an earlier one stays as it was, unless it was written in place."""
        if self._release() and self._created:
            with suppress(FileNotFoundError):
                os.unlink(os.path.realpath(self.place))

    def _release(self) -> bool:
        """Closes the descriptor; returns False if it was closed before."""
        closed, self._closed = self._closed, True
        if not closed:
            os.close(self._descriptor)
        return not closed

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        self.close() if kind is None else self.discard()


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Writes a whole file through ``OutputFile``, with its errors; a power cut leaves the old file or the new one."""
    with OutputFile(path) as file:
        file.write(data)
        if file._regular:
            os.fsync(file._descriptor)


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file in UTF-8; surrogates from undecodable file names become the bytes they stand for."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


@contextmanager
def locked(folder: AnyPath) -> Iterator[None]:
    """Lets one process of this machine at a time change a folder; raises ``OSError`` if it cannot be opened."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger("asymtrack_edge").warning("another process is working in %s: waiting", printable(folder))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replaceable(path: Path) -> bool:
    """Whether another file can be renamed onto ``path`` without loss, such as of a link, an owner or a mount."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return False
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return True
    # Mounted files, as containers use them, mostly lie on another device.
    plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
    return plain and found.st_dev == os.stat(path.parent).st_dev


def _create_beside(path: Path) -> Tuple[int, Path]:
    """Creates a file next to ``path`` that no other process uses, with the mode and group of the earlier file."""
    suffix = path.suffix if re.fullmatch(r"\.\w{1,8}", path.suffix, re.ASCII) else ""
    stem = re.sub(r"[^\w.-]", "_", path.stem[:200], flags=re.ASCII)
    for number in count():
        # Processes in two containers may have the same ID, and a killed process leaves its file behind.
        place = path.with_name(f".{stem}.{os.getpid()}{f'-{number}' if number else ''}.part{suffix}")
        with suppress(FileExistsError):
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            break
    with suppress(FileNotFoundError):
        earlier = os.lstat(path)
        with suppress(PermissionError):
            os.fchown(descriptor, -1, earlier.st_gid)
        with suppress(OSError):  # some file systems have no modes
            os.fchmod(descriptor, stat.S_IMODE(earlier.st_mode))
    return descriptor, place


def descriptor_of(path: AnyPath) -> Optional[int]:
    """The number of this process's open file that ``path`` names, such as ``/dev/stdout``; else None."""
    found = re.fullmatch(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)", str(path))
    return None if found is None else {"stdout": 1, "stderr": 2}.get(found[1]) or int(found[2])


def _open_straight(path: Path) -> int:
    number = descriptor_of(path)
    if number is not None:
        return os.dup(number)  # shares the file offset: opened anew, the two would overwrite each other
    # In a folder such as /tmp, Linux refuses O_CREAT for another user's file, even to root.
    create = 0 if path.exists() else os.O_CREAT
    return os.open(path, os.O_WRONLY | create | os.O_CLOEXEC | os.O_NOCTTY, 0o666)


def opencv_path(path: AnyPath) -> str:
    """The absolute path, which OpenCV and FFmpeg take for a file even if it contains colons, in any locale.

    Raises:
        SourceError: the name is not UTF-8. ``open_video`` and ``read_image`` can open such files.
    """
    try:
        return os.fsencode(os.path.abspath(path)).decode("utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"OpenCV cannot use the name {printable(path)}, which is not UTF-8: rename it") from None


def printable(path: AnyPath) -> str:
    """A path for messages, with bytes that are not UTF-8 escaped, so that it can be printed anywhere."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_video(path: AnyPath) -> cv2.VideoCapture:
    """A capture of a video file with any name; it is not opened if the file is missing or not a video."""
    try:
        name = opencv_path(path)
    except SourceError:
        name = "%"
    try:
        if "%" not in name and stat.S_ISREG(os.stat(path).st_mode):
            return cv2.VideoCapture(name)
        # Opening a FIFO or a terminal waits for its writer: signals can interrupt that here, but not in OpenCV.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return cv2.VideoCapture()
    try:
        name, opened = f"/proc/self/fd/{descriptor}", [cv2.VideoCapture()]
        thread = threading.Thread(target=lambda: opened.append(cv2.VideoCapture(name)), daemon=True)
        thread.start()
        thread.join()
        return opened[-1]
    finally:
        os.close(descriptor)


def read_image(path: AnyPath, first: Optional[AnyPath] = None) -> Optional[np.ndarray]:
    """Reads an image file as ``decode_image`` does; returns None if it cannot be read."""
    with suppress(OSError):
        return decode_image(np.fromfile(path, np.uint8), first)
    return None


def decode_image(data: np.ndarray, first: Optional[AnyPath] = None) -> Optional[np.ndarray]:
    """Decodes the bytes of an image file to upright BGR uint8 ``(H, W, 3)``; returns None if they are no image.

    More than 8 bits are stretched by the range of values in ``first``, the first file of the sequence, else in itself.
    """
    image = _decode(data)
    if image is None or image.dtype == np.uint8:
        return image
    span = None
    with suppress(OSError):
        span = first and _range_of_file(os.fspath(first), os.stat(first).st_mtime_ns)
    low, high = span or _range_of(image)
    image = np.nan_to_num(image.astype(np.float32), nan=low)
    image = ((np.clip(image, low, high) - low) * (255 / max(1e-6, high - low))).astype(np.uint8)
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)


@lru_cache(maxsize=16)
def _range_of_file(path: AnyPath, changed: int) -> Optional[Tuple[float, float]]:
    first = _decode(np.fromfile(path, np.uint8))
    return None if first is None or first.dtype == np.uint8 else _range_of(first)


def _range_of(image: np.ndarray) -> Tuple[float, float]:
    """The values shown as black and white: the range in use, as sensors fill little of 16 bits, with a margin."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.1, 99.9)) if finite.size else (0, 1)  # ignores dead pixels
    return float(low - (high - low) / 4), float(high + (high - low) / 4)


def _decode(data: np.ndarray) -> Optional[np.ndarray]:
    """An image at its stored depth; with 8 or 16 bits, as BGR."""
    with suppress(cv2.error):  # no data, or a header that claims an image larger than OpenCV accepts
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        other = image is None or image.dtype not in (np.uint8, np.uint16)
        return cv2.imdecode(data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR) if other else image
    return None


def write_image(path: AnyPath, image: np.ndarray) -> None:
    """Writes a uint8 image, BGR or grey, in the format of the name's suffix.

    Raises:
        UsageError: it cannot be written there, or OpenCV has no such format.
        OSError: the disk is full or gone.
    """
    try:
        good, data = cv2.imencode(Path(path).suffix or ".", image)
    except cv2.error:
        good = False
    if not good:
        raise UsageError(f"cannot write {path}: OpenCV has no such image format; try .png or .jpg")
    write_bytes(path, data.tobytes())


def read_lines(path: AnyPath) -> List[str]:
    """The non-empty lines of a text file, stripped.

    The text is UTF-8 with or without a byte order mark, or UTF-16 with one, with any system's line endings.

    Raises:
        DatasetError: it cannot be read or has another encoding.
    """
    try:
        data = Path(path).read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError
    except OSError as error:
        raise DatasetError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    except ValueError:
        raise DatasetError(f"{printable(path)} is not text in UTF-8 or UTF-16: save it as UTF-8") from None
    return [line.strip() for line in re.split(r"\r\n?|\n", text) if line.strip()]


def system_text(path: Path) -> str:
    """The text of a small system file, as in /proc and /sys; empty if it cannot be read."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return ""


def list_files(folder: AnyPath, suffixes: Tuple[str, ...] = IMAGE_SUFFIXES) -> List[Path]:
    """The files of a folder with one of ``suffixes`` (lower case), ``2.jpg`` before ``10.jpg``.

    Hidden files are left out: some systems add ``._1.jpg`` to ``1.jpg``.
    """
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    # A dangling or circular link stands for a file that was not fetched: that is reported when it is read.
    files = [e.name for e in visible if (e.is_symlink() and not os.path.exists(e)) or e.is_file()]
    return [Path(folder, name) for name in sorted(files, key=natural) if name.lower().endswith(suffixes)]


def natural(name: str) -> Tuple[List[Union[int, str]], str]:
    """Sort key that orders numbers within names by their value."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name
