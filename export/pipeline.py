"""From a trained model to a verified model directory."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional
from uuid import uuid4

import onnx
import torch
from torch.utils.flop_counter import FlopCounterMode

import asymtrack_edge
from asymtrack_edge.errors import ExportError, UsageError
from asymtrack_edge.export.fold import fold, to_half
from asymtrack_edge.export.graph import write_onnx
from asymtrack_edge.export.quantise import quantise
from asymtrack_edge.export.split import MODULES, describe, example_inputs, fold_input
from asymtrack_edge.export.verify import verify
from asymtrack_edge.files import locked
from asymtrack_edge.manifest import NETWORKS, PLATFORMS, UINT8_BGR, FileEntry, Manifest, file_entry, is_export
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.comparison import LIMITS
from asymtrack_edge.runtime.sources.clip import Clip, default_clip


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"`` (see ``quantise``; only for the platform ``onnx``).
        platform: key of ``manifest.PLATFORMS``.
        opset: None for the platform's default.
        max_batch: 1 for a static batch of one; more leaves the batch axis free from 1 to this.
        input_format: None for the platform's default.
        half_storage: store fp32 weights as fp16 (rounded); they are cast back when the model is loaded.
    """

    precision: str = "fp32"
    platform: str = "onnx"
    opset: Optional[int] = None
    max_batch: int = 1
    input_format: Optional[str] = None
    half_storage: bool = False

    def __post_init__(self) -> None:
        if self.precision not in LIMITS or self.platform not in PLATFORMS:
            known = f"precision among {', '.join(LIMITS)}, and platform among {', '.join(PLATFORMS)}"
            raise UsageError(f"cannot export in {self.precision!r} for {self.platform!r}: choose {known}")
        if self.precision == "int8" and (self.platform != "onnx" or self.input_format not in (None, UINT8_BGR)):
            raise UsageError(f"int8 is for CPUs and crops of {UINT8_BGR}: leave out --target and --input")
        if self.platform != "onnx" and self.input_format == UINT8_BGR:
            raise UsageError(f"--input {UINT8_BGR} is for ONNX Runtime: leave out --input or --target")
        if not 1 <= self.max_batch <= 64:
            raise UsageError(f"--batch must be in 1..64, not {self.max_batch}")
        if self.opset is not None and not 13 <= self.opset <= 20:
            raise UsageError(f"--opset must be in 13..20, not {self.opset}")
        most = PLATFORMS[self.platform][0]
        if self.platform in ("xavier", "orin") and (self.opset or most) > most:
            raise UsageError(f"--target {self.platform} takes opsets up to {most}, the newest that its TensorRT reads")


@dataclass
class Export:
    """One export; ``run`` takes it through all steps: fold, split, write, verify, build engines, save.

    Attributes:
        model: trained, in training form; its weights stay as they are, and it is switched to eval mode.
        options: how to export.
        weights: where the weights come from, for the manifest.
        clip: BGR frames and the first box, to verify on and (int8) to calibrate on; None for a synthetic clip.
    """

    model: AsymTrack
    options: ExportOptions = ExportOptions()
    weights: Dict[str, Any] = field(default_factory=dict)
    clip: Optional[Clip] = None

    def run(
        self,
        output: Path,
        engines: bool = False,
        report: Callable[[str], None] = print,
        publish: Optional[Callable[[Path, Manifest], None]] = None,
    ) -> Manifest:
        """Exports to the directory ``output``, replacing it only if everything succeeds.

        Args:
            output: directory to make or replace.
            engines: also build the platform's engines if this machine can; if it cannot, or a build fails, the
                ONNX models are kept without them.
            report: called with one line about each engine.
            publish: called with the finished directory before it becomes ``output``; if it raises, nothing is replaced.

        Raises:
            ExportError: the export failed, did not pass its verification, or cannot be written.
        """
        limits = LIMITS["fp16" if self.options.half_storage else self.options.precision]
        with replaced_directory(output) as folder:
            manifest = self.write(folder)
            verification = verify(folder, manifest, self.model, *(self.clip or default_clip()), limits)
            if self.options.precision == "int8":
                # Ranges that are too narrow do not show on the clip that they were measured on.
                verification["unseen"] = verify(folder, manifest, self.model, *default_clip(seed=1), limits)
            manifest = replace(manifest, verification=verification)
            if engines and self.options.platform != "onnx":
                from asymtrack_edge.runtime.backends.tensorrt.build import engines_or_note

                manifest = engines_or_note(folder, manifest, output, report=report)
            manifest.save(folder)
            if publish is not None:
                publish(folder, manifest)
        return manifest

    def write(self, folder: Path) -> Manifest:
        """Folds, splits and writes ``template.onnx`` and ``search.onnx`` into an existing directory.

        Returns the manifest, not yet saved, with the files' hashes and their provenance.
        """
        options = self.options
        newest_opset, usual_format = PLATFORMS[options.platform]
        opset, input_format = options.opset or newest_opset, options.input_format or usual_format
        folded = fold(self.model)
        manifest = describe(folded.variant, options.precision, options.platform, opset, options.max_batch, input_format)
        provenance = {
            **model_size(folded),
            "asymtrack_edge": asymtrack_edge.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **self.weights,
        }
        if options.precision == "fp16":
            folded = to_half(folded, casts=options.platform != "onnx")
        fold_input(folded, input_format)
        spell_out = (options.precision, options.platform) == ("fp16", "rtx")
        for name, module in MODULES.items():
            network, path = module(folded, input_format), folder / f"{name}.onnx"
            inputs = example_inputs(manifest, name, min(options.max_batch, 2))
            outputs = [spec.name for spec in manifest.tensors(name)[1]]
            write_onnx(network, inputs, outputs, path, opset, options.max_batch > 1, options.half_storage, spell_out)
        manifest = replace(manifest, files=_entries(folder), provenance=provenance)
        if options.precision == "int8":
            quantise(folder, manifest, *(self.clip or default_clip()))
            manifest = replace(manifest, files=_entries(folder))
        return manifest


def _entries(folder: Path) -> Dict[str, FileEntry]:
    return {f"{name}.onnx": file_entry(folder / f"{name}.onnx") for name in NETWORKS}


def model_size(folded: AsymTrack) -> Dict[str, Any]:
    """Parameters and multiply-adds (batch 1, by PyTorch's own counter) of a folded model's networks."""
    sizes = {"parameters": sum(p.numel() for p in folded.parameters())}
    manifest = describe(folded.variant)
    for name, module in MODULES.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(folded, manifest.input_format)(*example_inputs(manifest, name, 1).values())
        sizes[f"{name}_multiply_adds"] = counter.get_total_flops() // 2
    return sizes


@contextmanager
def replaced_directory(output: Path) -> Iterator[Path]:
    """Yields a new directory beside ``output``, which takes its place when the block succeeds.

    A link stays a link: its target is replaced. Mode and group are kept where the system allows it. If the block
    raises, the new directory is removed and ``output`` stays as it was. If two processes write to the same output,
    they replace it in turn, and the later one's directory stays.

    Raises:
        ExportError: ``output`` is something that an export must not replace, or cannot be written.
    """
    if output.is_symlink():
        output = output.resolve()
    immovable = ExportError(f"{output} cannot be replaced: name a folder in it, or another one, as --output")
    if not output.name:
        raise immovable
    beside = output.with_name(f".{output.name}-{uuid4().hex[:8]}")
    old = beside.with_name(f"{beside.name}-old")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            if output.exists():  # a mounted folder cannot be renamed: report that before the work
                try:
                    os.rename(output, old)
                    os.rename(old, output)
                except OSError:
                    raise immovable from None
        beside.mkdir()
        yield beside
        with _locked(output):
            if output.exists():
                with suppress(OSError):
                    shutil.copymode(output, beside)
                    os.chown(beside, -1, output.stat().st_gid)
                os.rename(output, old)
            os.rename(beside, output)
    except OSError as error:
        raise ExportError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # a signal may come between any two lines
            if not output.exists():
                os.rename(old, output)
        shutil.rmtree(beside, ignore_errors=True)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps others from replacing ``output``, or building engines in it; errors as in ``_check_replaceable``."""
    with locked(output.parent):  # the directory itself is missing for a moment while another process replaces it
        _check_replaceable(output)
        with locked(output) if output.exists() else nullcontext():
            yield


def _check_replaceable(output: Path) -> None:
    """Raises ``ExportError`` if ``output`` exists and is anything but a model directory or an empty folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    # Other programs have files of that name too: web pages, browser extensions.
    if not is_export(output):
        raise ExportError(f"{output} exists and is not a model directory: choose another folder")
    part = r"|\..*\.part\.(json|engine)"  # left by a build that was killed
    for other in sorted(output.iterdir()):
        if not re.fullmatch(r"manifest\.json|(template|search|model)(-sm75)?\.(onnx|engine|plan)" + part, other.name):
            raise ExportError(f"{other} is not part of a model: move it, or choose another folder")
