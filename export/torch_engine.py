"""The trained PyTorch model behind the runtime's engine interface, as the yardstick of an export."""

from __future__ import annotations

from dataclasses import replace
from typing import Dict

import torch
from torch import Tensor

from asymtrack_edge.export.description import describe
from asymtrack_edge.export.split import localisation_score
from asymtrack_edge.manifest import FLOAT_RGB
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.backends.host import HostBackend


class TorchBackend(HostBackend):
    """Runs an ``AsymTrack``, in whatever form, in eager PyTorch.

    Args:
        model: in training or folded form, fp32; switched to eval mode.
        device: where to run it.
    """

    def __init__(self, model: AsymTrack, device: str = "cpu") -> None:
        manifest = describe(model.variant, "fp32", "onnx", 17, 64, FLOAT_RGB)
        super().__init__(replace(manifest, max_batch=64), f"torch {device}")
        self.model = model.eval().to(device)
        self._device = device
        self.reserve(1)

    def _run_template(self, slot: int) -> None:
        with torch.inference_mode():
            state = self.model.template(torch.from_numpy(self._template_image).to(self._device))
        for name, value in state.items():
            self.state[name][slot] = value[0].float().cpu().numpy()

    def _run_searches(self, count: int) -> None:
        state: Dict[str, Tensor] = {n: torch.from_numpy(v[:count]).to(self._device) for n, v in self.state.items()}
        with torch.inference_mode():
            answer = self.model.search(torch.from_numpy(self._search_images[:count]).to(self._device), state)
            score = localisation_score(answer.score_tl, answer.score_br)
            prediction = torch.cat([answer.box.float(), score], 1)
        self._predictions[:count] = prediction.cpu().numpy()
