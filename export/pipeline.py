"""From a trained model to a verified export directory."""

from __future__ import annotations

import copy
import datetime
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

import asymtrack_edge
from asymtrack_edge.errors import UsageError
from asymtrack_edge.export.description import describe
from asymtrack_edge.export.directory import replaced_directory
from asymtrack_edge.export.fold import count_multiply_adds, count_parameters, fold, to_half
from asymtrack_edge.export.graph import write_onnx
from asymtrack_edge.export.lint import LINTED_TARGETS, require_readable
from asymtrack_edge.export.quantise import quantise
from asymtrack_edge.export.split import SearchNetwork, TemplateNetwork, fold_input
from asymtrack_edge.export.storage import store_weights_as_half
from asymtrack_edge.export.turing import spell_out_fp32_products
from asymtrack_edge.export.verify import require_passed, verify
from asymtrack_edge.geometry import Box
from asymtrack_edge.manifest import FLOAT_RGB, UINT8_BGR, FileEntry, Manifest, file_entry
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.agreement import LIMITS, Limits
from asymtrack_edge.runtime.sources.clip import default_clip


@dataclass(frozen=True)
class Target:
    """What a deployment target can read.

    Attributes:
        opset: the newest it reads without replacing operators.
        input_format: bytes where OpenCV makes the crop; normalised floats where a CUDA kernel does.
    """

    opset: int
    input_format: str


#: ``xavier`` is TensorRT 8.5 (JetPack 5): its parser has no LayerNormalization, so opset 16 spells it out.
TARGETS: Dict[str, Target] = {
    "onnx": Target(17, UINT8_BGR),
    "xavier": Target(16, FLOAT_RGB),
    "orin": Target(17, FLOAT_RGB),
    "rtx": Target(17, FLOAT_RGB),
}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"`` (see ``quantise``; only for the target ``onnx``).
        target: key of ``TARGETS``.
        opset: None for the target's.
        max_batch: 1 for a static batch of one; more leaves the batch axis free from 1 to this.
        input_format: None for the target's.
        half_storage: store fp32 weights as fp16 (rounded), to be cast back when the model is loaded.
    """

    precision: str = "fp32"
    target: str = "onnx"
    opset: Optional[int] = None
    max_batch: int = 1
    input_format: Optional[str] = None
    half_storage: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16", "int8"):
            raise UsageError(f"precision {self.precision!r} is not supported: use fp32, fp16 or int8")
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}: choose one of {', '.join(TARGETS)}")
        if self.precision == "int8" and (self.target != "onnx" or self.input_format not in (None, UINT8_BGR)):
            raise UsageError(f"int8 is for CPUs and crops of {UINT8_BGR}: leave out --target and --input")
        if not 1 <= self.max_batch <= 64:
            raise UsageError(f"--batch must lie in 1..64, not {self.max_batch}")
        if self.opset is not None and not 13 <= self.opset <= 20:
            raise UsageError(f"--opset must lie in 13..20, not {self.opset}")

    @property
    def limits(self) -> Limits:
        """How far the export may differ from the trained model: see ``agreement.LIMITS``."""
        return LIMITS["fp16" if self.half_storage else self.precision]


def write_models(model: AsymTrack, options: ExportOptions, folder: Path) -> Manifest:
    """Folds, splits and writes ``template.onnx`` and ``search.onnx`` into ``folder``.

    Args:
        model: trained, in training form; it is not changed.
        options: how to export.
        folder: an existing directory.

    An int8 export is written in fp32: quantising it takes a clip as well (``export``).

    Returns:
        The manifest, not yet written, with the files' hashes and the models' sizes in ``provenance``.
    """
    target = TARGETS[options.target]
    opset = options.opset or target.opset
    input_format = options.input_format or target.input_format
    manifest = describe(model.variant, options.precision, options.target, opset, options.max_batch, input_format)
    folded = fold(model)
    if options.precision == "fp16":
        folded = to_half(folded)
    fold_input(folded, input_format)
    template, search = TemplateNetwork(folded, input_format), SearchNetwork(folded, input_format)
    dynamic = options.max_batch > 1
    example = _example(manifest, 2 if dynamic else 1)
    names = [spec.name for spec in manifest.state]
    image = {manifest.template.name: example.pop("template")}
    write_onnx(template, image, names, opset, dynamic, folder / "template.onnx")
    inputs = {manifest.search.name: example.pop("search"), **example}
    write_onnx(search, inputs, [manifest.output.name], opset, dynamic, folder / "search.onnx")
    names = ["template.onnx", "search.onnx"]
    if options.half_storage:
        for name in names:
            store_weights_as_half(folder / name)
    for name in names:
        if options.target == "rtx" and options.precision == "fp16":
            spell_out_fp32_products(folder / name)
        if options.target in LINTED_TARGETS:
            require_readable(folder / name)
    files = {name: file_entry(folder / name) for name in names}
    return replace(manifest, files=files, provenance=model_size(model))


def model_size(model: AsymTrack) -> Dict[str, Any]:
    """Parameters and multiply-adds (batch 1) of a model's networks, folded and split."""
    folded = copy.deepcopy(fold(model))
    manifest = describe(model.variant, "fp32", "onnx", 17, 1, FLOAT_RGB)
    example = _example(manifest, 1)
    image = {"image": example.pop("template")}
    search = {"image": example.pop("search"), **example}
    return {
        "parameters": count_parameters(folded),
        "search_multiply_adds": count_multiply_adds(SearchNetwork(folded, FLOAT_RGB), search),
        "template_multiply_adds": count_multiply_adds(TemplateNetwork(folded, FLOAT_RGB), image),
    }


def _example(manifest: Manifest, batch: int) -> Dict[str, Tensor]:
    """Tensors of the right shapes and types: ``template``, ``search`` and the state."""
    specs = {"template": manifest.template, "search": manifest.search, **{s.name: s for s in manifest.state}}
    return {key: torch.zeros((batch, *spec.shape), dtype=getattr(torch, spec.dtype)) for key, spec in specs.items()}


def export(
    model: AsymTrack,
    options: ExportOptions,
    output: Path,
    provenance: Optional[Dict[str, Any]] = None,
    clip: Optional[Tuple[Sequence[np.ndarray], Box]] = None,
    finish: Optional[Callable[[Path, Manifest], Manifest]] = None,
) -> Manifest:
    """Exports ``model`` to the directory ``output``, replacing it only if all went well.

    Args:
        model: trained, in training form.
        options: how to export.
        output: directory to make or replace.
        provenance: where the weights come from, for the manifest.
        clip: BGR frames and the first box to verify on, and for int8 to calibrate on; None for a
            synthetic clip.
        finish: called with the new directory and its manifest after verification (to build engines);
            returns the manifest to write.

    Raises:
        ExportError: the export failed, did not pass its verification, or cannot be written.
    """
    clip = clip or default_clip()
    with replaced_directory(output) as folder:
        manifest = write_models(model, options, folder)
        if options.precision == "int8":
            quantise(folder, manifest, *clip)
            files = {**manifest.files, "search.onnx": file_entry(folder / "search.onnx")}
            manifest = replace(manifest, files=files)
        verification = verify(folder, manifest, model, *clip, limits=options.limits)
        require_passed(verification)
        if options.precision == "int8":
            # Ranges that clip values cannot show on the clip that they were measured on.
            verification["unseen"] = verify(folder, manifest, model, *default_clip(seed=1), limits=options.limits)
            require_passed(verification["unseen"])
        provenance = {**manifest.provenance, **versions(), **(provenance or {})}
        manifest = replace(manifest, provenance=provenance, verification=verification)
        if finish is not None:
            manifest = finish(folder, manifest)
        manifest.save(folder)
    return manifest


def versions() -> Dict[str, Any]:
    """Versions of what made an export, and when."""
    import onnx

    return {
        "asymtrack_edge": asymtrack_edge.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def total_bytes(files: Dict[str, FileEntry]) -> int:
    """Size of all files together."""
    return sum(entry.bytes for entry in files.values())
