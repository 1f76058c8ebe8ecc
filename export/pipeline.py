"""From a trained model to a verified model directory."""

from __future__ import annotations

import datetime
import fcntl
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import asymtrack_edge
from asymtrack_edge.errors import ExportError, UsageError
from asymtrack_edge.export.fold import fold, to_half
from asymtrack_edge.export.graph import write_onnx
from asymtrack_edge.export.lint import require_readable
from asymtrack_edge.export.quantise import quantise
from asymtrack_edge.export.split import SearchNetwork, TemplateNetwork, describe, example_inputs, fold_input
from asymtrack_edge.export.verify import require_passed, verify
from asymtrack_edge.manifest import FLOAT_RGB, UINT8_BGR, Manifest, file_entry, is_export
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.agreement import LIMITS
from asymtrack_edge.runtime.sources.clip import Clip, default_clip

TEMPLATE, SEARCH = "template.onnx", "search.onnx"


#: The newest opset that a platform reads without replacing operators, and what its networks take: bytes where OpenCV
#: makes the crop, normalised floats where a CUDA kernel does. ``xavier`` is TensorRT 8.5 (JetPack 5): its parser has
#: no LayerNormalization, so opset 16 spells it out.
PLATFORMS: Dict[str, Tuple[int, str]] = {
    "onnx": (17, UINT8_BGR),
    "xavier": (16, FLOAT_RGB),
    "orin": (17, FLOAT_RGB),
    "rtx": (17, FLOAT_RGB),
}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"`` (see ``quantise``; only for the platform ``onnx``).
        platform: key of ``PLATFORMS``.
        opset: None for the platform's.
        max_batch: 1 for a static batch of one; more leaves the batch axis free from 1 to this.
        input_format: None for the platform's.
        half_storage: store fp32 weights as fp16 (rounded), to be cast back when the model is loaded.
    """

    precision: str = "fp32"
    platform: str = "onnx"
    opset: Optional[int] = None
    max_batch: int = 1
    input_format: Optional[str] = None
    half_storage: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16", "int8"):
            raise UsageError(f"precision {self.precision!r} is not supported: use fp32, fp16 or int8")
        if self.platform not in PLATFORMS:
            raise UsageError(f"unknown platform {self.platform!r}: choose one of {', '.join(PLATFORMS)}")
        if self.precision == "int8" and (self.platform != "onnx" or self.input_format not in (None, UINT8_BGR)):
            raise UsageError(f"int8 is for CPUs and crops of {UINT8_BGR}: leave out --target and --input")
        if not 1 <= self.max_batch <= 64:
            raise UsageError(f"--batch must lie in 1..64, not {self.max_batch}")
        if self.opset is not None and not 13 <= self.opset <= 20:
            raise UsageError(f"--opset must lie in 13..20, not {self.opset}")


class Export:
    """One export, walked once by ``run``: fold, split, write, verify, build engines, save.

    Args:
        model: trained, in training form; it is not changed.
        options: how to export.
        provenance: where the weights come from, for the manifest.
        clip: BGR frames and the first box to verify on, and for int8 to calibrate on; None for a synthetic clip.

    Attributes:
        manifest: what is known of the export so far.
    """

    def __init__(
        self,
        model: AsymTrack,
        options: Optional[ExportOptions] = None,
        provenance: Optional[Dict[str, Any]] = None,
        clip: Optional[Clip] = None,
    ) -> None:
        self.model = model
        self.options = options = options or ExportOptions()
        self.clip = clip
        opset, input_format = PLATFORMS[options.platform]
        self.manifest = describe(
            model.variant,
            options.precision,
            options.platform,
            options.opset or opset,
            options.max_batch,
            options.input_format or input_format,
        )
        self._weights = provenance or {}

    def run(self, output: Path, engines: bool = False, report: Callable[[str], None] = print) -> Manifest:
        """Exports to the directory ``output``, replacing it only if all went well.

        Args:
            output: directory to make or replace.
            engines: also build the platform's engines where this machine can; where it cannot, or a build fails,
                the ONNX models are kept without them.
            report: called with a line on each engine.

        Raises:
            ExportError: the export failed, did not pass its verification, or cannot be written.
        """
        with replaced_directory(output) as folder:
            self.write(folder)
            self.verify(folder)
            if engines and self.options.platform != "onnx":
                from asymtrack_edge.runtime.backends.tensorrt.build import engines_or_note

                self.manifest = engines_or_note(folder, self.manifest, output, report=report)
            self.manifest.save(folder)
        return self.manifest

    def write(self, folder: Path) -> Manifest:
        """Folds, splits and writes ``template.onnx`` and ``search.onnx`` into an existing directory.

        Returns:
            The manifest, not yet written, with the files' hashes and what made them.
        """
        options, manifest = self.options, self.manifest
        folded = fold(self.model)
        if options.precision == "fp16":
            folded = to_half(folded)
        fold_input(folded, manifest.input_format)
        dynamic = options.max_batch > 1
        template, search = example_inputs(manifest, 2 if dynamic else 1)
        for network, inputs, outputs, name in (
            (TemplateNetwork(folded, manifest.input_format), template, [s.name for s in manifest.state], TEMPLATE),
            (SearchNetwork(folded, manifest.input_format), search, [manifest.output.name], SEARCH),
        ):
            spell_out = options.platform == "rtx" and options.precision == "fp16"
            path = folder / name
            write_onnx(network, inputs, outputs, path, manifest.opset, dynamic, options.half_storage, spell_out)
            if options.platform == "xavier":
                require_readable(path)
        if options.precision == "int8":
            quantise(folder, manifest, *(self.clip or default_clip()))
        files = {name: file_entry(folder / name) for name in (TEMPLATE, SEARCH)}
        self.manifest = replace(
            manifest, files=files, provenance={**model_size(self.model), **versions(), **self._weights}
        )
        return self.manifest

    def verify(self, folder: Path) -> None:
        """Holds what was written against the trained model, and notes the result in the manifest.

        Raises:
            ExportError: it differs by more than the precision allows.
        """
        limits = LIMITS["fp16" if self.options.half_storage else self.options.precision]
        report = verify(folder, self.manifest, self.model, *(self.clip or default_clip()), limits=limits)
        require_passed(report)
        if self.options.precision == "int8":
            # Ranges that clip values cannot show on the clip that they were measured on.
            report["unseen"] = verify(folder, self.manifest, self.model, *default_clip(seed=1), limits=limits)
            require_passed(report["unseen"])
        self.manifest = replace(self.manifest, verification=report)


def model_size(model: AsymTrack) -> Dict[str, Any]:
    """Parameters and multiply-adds (batch 1, by PyTorch's own counter) of a model's networks, folded and split."""
    folded = fold(model)
    template, search = example_inputs(describe(folded.variant), 1)

    def multiply_adds(network: torch.nn.Module, inputs: Dict[str, torch.Tensor]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*inputs.values())
        return counter.get_total_flops() // 2

    return {
        "parameters": sum(p.numel() for p in folded.parameters()),
        "search_multiply_adds": multiply_adds(SearchNetwork(folded, FLOAT_RGB), search),
        "template_multiply_adds": multiply_adds(TemplateNetwork(folded, FLOAT_RGB), template),
    }


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


@contextmanager
def replaced_directory(output: Path) -> Iterator[Path]:
    """Gives a new directory beside ``output`` that takes its place when the block ends well.

    If the block raises, the new directory is removed and ``output`` stays as it was. Two processes
    that write to the same output take turns at the exchange; the later one's directory stays.

    Raises:
        ExportError: ``output`` is something that an export must not replace, or cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Under the lock: while another process exchanges the directory, it is neither here nor there.
        with _lock(output):
            replaceable = _replaceable(output)
        if not replaceable:
            raise ExportError(f"{output} exists and is no model directory: choose another --output")
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise ExportError(f"cannot write {output}: {error.strerror}") from None
    try:
        yield beside
        beside.chmod(0o755)
        with _lock(output):
            _exchange(beside, output)
    except OSError as error:
        # What the caller did elsewhere is not this directory's fault.
        elsewhere = error.filename is not None and beside not in (Path(error.filename), *Path(error.filename).parents)
        place = error.filename if elsewhere else output
        raise ExportError(f"cannot write {place}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replaceable(output: Path) -> bool:
    """Whether ``output`` is free, empty, or an export."""
    if not output.exists():
        return True
    # Others have files of that name too: web pages, browser extensions.
    return output.is_dir() and (is_export(output) or not any(output.iterdir()))


def _exchange(new: Path, output: Path) -> None:
    """Puts ``new`` in ``output``'s place; the old directory is removed afterwards."""
    old = new.with_name(new.name + "-old")
    if output.exists():
        os.rename(output, old)
    try:
        os.rename(new, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
