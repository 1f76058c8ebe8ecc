"""``manifest.json``: everything needed to use a model directory, with or without this package.

A model directory holds ``template.onnx`` and ``search.onnx``, optionally engines built from them, and
the manifest. The manifest states each file's size and SHA-256, each tensor's name, type and shape, how
to cut the crops and how to read the prediction. No file in the directory is trusted before its hash has
been checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Dict, Tuple, cast, get_args, get_origin, get_type_hints

from asymtrack_edge.errors import ManifestError
from asymtrack_edge.files import write_text

FORMAT = "asymtrack-edge-export"
VERSION = 1
FILE_NAME = "manifest.json"
#: Names of a model's networks, and of their files without the suffix.
NETWORKS = ("template", "search")
#: Name of a free batch axis in the ONNX models.
BATCH_AXIS = "batch"

#: The two crop formats, by name: what the networks' ``image`` input expects.
UINT8_BGR = "uint8-bgr-hwc"
FLOAT_RGB = "float-rgb-chw"

#: For each platform, the newest opset that it reads without replacing operators, and its crop format: bytes where
#: OpenCV makes the crop, normalised floats where a CUDA kernel does. ``xavier`` is TensorRT 8.5 (JetPack 5), whose
#: parser has no LayerNormalization; opset 16 writes it with basic operators.
PLATFORMS: Dict[str, Tuple[int, str]] = {
    "onnx": (17, UINT8_BGR),
    "xavier": (16, FLOAT_RGB),
    "orin": (17, FLOAT_RGB),
    "rtx": (17, FLOAT_RGB),
}

_HOW_TO = {
    "crop": (
        "Around a box (x, y, w, h) in frame pixels: side = ceil(sqrt(w * h) * factor); left = "
        "round_half_even(x + w / 2 - side / 2), top likewise; pixels outside the frame are 0, and where "
        "left + side >= frame width the last column counts as outside (rows likewise); resize bilinearly "
        "(cv2.INTER_LINEAR) to size x size."
    ),
    "input": (
        "uint8-bgr-hwc: the crop as it is, BGR bytes, (batch, size, size, 3). float-rgb-chw: RGB, "
        "(value / 255 - mean) / std per channel, (batch, 3, size, size)."
    ),
    "order": (
        "Run template once per target, on the crop around its first box. For each following frame, run search "
        "on the crop around the last box; its other inputs are template's outputs of the same names, unchanged."
    ),
    "output": (
        "prediction (batch, 5): cx, cy, w, h of the target in units of the crop's side, and a score in 0..1 "
        "(how sharply both corners are located; low when the target is gone). In the frame: "
        "centre = last centre - side / 2 + (cx, cy) * side; size = (w, h) * side; then left = min(max(0, "
        "left), width - 10), right = min(max(10, right), width), w = max(10, right - left), and y likewise."
    ),
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network.

    Attributes:
        name: in the ONNX model.
        dtype: ``"uint8"``, ``"float16"`` or ``"float32"``.
        shape: without the batch axis.
    """

    name: str
    dtype: str
    shape: Tuple[int, ...]

    def __post_init__(self) -> None:
        known = self.dtype in ("uint8", "float16", "float32")
        if not known or len(self.shape) > 8 or min(self.shape, default=1) < 1 or math.prod(self.shape) > 1 << 24:
            raise ValueError(f"tensor {self}")


def image_spec(input_format: str, side: int) -> TensorSpec:
    """The image input of a network of ``input_format``: a crop of ``side`` x ``side`` pixels."""
    if input_format == UINT8_BGR:
        return TensorSpec("image", "uint8", (side, side, 3))
    return TensorSpec("image", "float32", (3, side, side))


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) of a file in the directory."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Attributes:
        variant: ``"T"``, ``"S"``, ``"B"``.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``: the networks' arithmetic.
        platform: key of ``PLATFORMS`` that the models were written for; ``target`` in the file, as in ``--target``.
        opset: ONNX operator set of both networks.
        max_batch: 1 for a static batch of one, else the batch axis is free from 1 to this.
        input_format: ``UINT8_BGR`` or ``FLOAT_RGB``.
        template, search: image inputs.
        state: outputs of the template network, which are inputs of the search network.
        output: output of the search network.
        template_factor, search_factor: side of the crop divided by ``sqrt(w * h)``.
        mean, std: of the RGB channels, for values in 0..1.
        files: every file in the directory except the manifest.
        provenance: checkpoint, versions, date, parameters and multiply-adds.
        verification: what was compared after the export, and the results.
        engines: for each engine file, the key that it was built for.
    """

    variant: str
    precision: str
    platform: str
    opset: int
    max_batch: int
    input_format: str
    template: TensorSpec
    search: TensorSpec
    state: Tuple[TensorSpec, ...]
    output: TensorSpec
    template_factor: float
    search_factor: float
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    files: Dict[str, FileEntry]
    provenance: Dict[str, Any] = field(default_factory=dict)
    verification: Dict[str, Any] = field(default_factory=dict)
    engines: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16", "int8") or not self.state:
            raise ValueError("an unknown precision, or no template state")
        if self.input_format not in (UINT8_BGR, FLOAT_RGB) or not 1 <= self.max_batch <= 1024:
            raise ValueError(f"{self.input_format}, {self.max_batch}")
        for image in (self.template, self.search):
            if image != image_spec(self.input_format, image.shape[1]):
                raise ValueError(f"{self.input_format} as {image}")
        if not all(0 < factor < 100 for factor in (self.template_factor, self.search_factor)):
            raise ValueError(f"factors {self.template_factor}, {self.search_factor}")
        if not len(self.mean) == len(self.std) == 3 or not min(self.std) > 0:
            raise ValueError(f"mean {self.mean}, std {self.std}")
        plain = all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name) for name in self.files)
        if not plain or not all(name.endswith(".engine") for name in self.engines):
            raise ValueError(f"file names {[*self.files, *self.engines]}")

    @property
    def template_size(self) -> int:
        """Side of the template crop in pixels."""
        return self.template.shape[1]

    @property
    def search_size(self) -> int:
        """Side of the search crop in pixels."""
        return self.search.shape[1]

    def tensors(self, network: str) -> Tuple[Tuple[TensorSpec, ...], Tuple[TensorSpec, ...]]:
        """Inputs, the image first, and outputs of the ``"template"`` or the ``"search"`` network."""
        if network == "template":
            return (self.template,), self.state
        return (self.search, *self.state), (self.output,)

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` into ``folder``; a reader sees either the whole old file or the whole new one."""
        fields = {"target" if name == "platform" else name: value for name, value in asdict(self).items()}
        content = {"format": FORMAT, "version": VERSION, **fields, "how_to": _HOW_TO}
        write_text(folder / FILE_NAME, json.dumps(content, indent=2) + "\n")


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file, read once."""
    content = path.read_bytes()
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def is_export(folder: Path) -> bool:
    """Whether this package wrote a folder, whatever state it is in now."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a model directory; each file that it lists is checked when it is read, by ``read_file``.

    Raises:
        ManifestError: the folder is not a model directory, or its manifest is damaged or of another version.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{folder} is not a model (no {FILE_NAME} in it): give a directory written by asymtrack-export"
        ) from None
    except (OSError, RecursionError, ValueError) as error:
        raise ManifestError(f"cannot read {path}: {error}: export again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ManifestError(f"{path} is not an {FORMAT} manifest: make one with asymtrack-export")
    if content.get("version") != VERSION:
        raise ManifestError(f"{path} has version {content.get('version')}, not {VERSION}: export with this release")
    try:
        manifest: Manifest = _as(Manifest, {**content, "platform": content["target"]})
        for network in NETWORKS:
            manifest.files[f"{network}.onnx"]
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ManifestError(f"{path} is damaged ({error!r}): export again") from None
    return manifest


def read_file(folder: Path, name: str, entry: FileEntry) -> bytes:
    """Reads a file of the directory; raises ``ManifestError`` if it is missing or differs from the manifest."""
    path = folder / name
    again = f"asymtrack-build {folder}" if name.endswith(".engine") else "export again"
    if not path.is_file():
        raise ManifestError(f"{path} is missing: {again}")
    # Check the size first: an altered file may be endless.
    content = path.read_bytes() if path.stat().st_size == entry.bytes else b""
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ManifestError(f"{path} is not the file the manifest describes (altered or damaged): {again}")
    return content


def read_networks(folder: Path, manifest: Manifest) -> Dict[str, bytes]:
    """Reads the directory's ONNX models, by network; errors as in ``read_file``."""
    return {n: read_file(folder, f"{n}.onnx", manifest.files[f"{n}.onnx"]) for n in NETWORKS}


def _as(kind: Any, value: Any) -> Any:
    """Converts a JSON value to ``kind``: a dataclass, a tuple or dictionary of a type, or a callable."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        # If a field without a default is missing, the class itself raises.
        hints, make = get_type_hints(kind), cast(Any, kind)
        return make(**{name: _as(hint, value[name]) for name, hint in hints.items() if name in value})
    if origin is tuple:
        return tuple(_as(inner[0], item) for item in value)
    if origin is dict:
        return {name: _as(inner[1], item) for name, item in value.items()}
    return value if kind is Any else kind(value)
