"""The members of the AsymTrack family: sizes and depths.

Nothing here imports torch, so that the runtime can use it on a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Tuple

from asymtrack_edge.errors import UsageError

#: Folder with the bundled weights, ONNX pair and model card of each variant.
BUNDLED = Path(__file__).resolve().parent / "weights"

#: Mean and standard deviation of the RGB channels (ImageNet), for values in 0..1.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """Architecture of one AsymTrack model.

    The last two fields are the ablation switches of the paper's Table 4; their defaults give the published
    models. Stages are counted from 1.

    Attributes:
        name: ``"T"``, ``"S"`` or ``"B"`` for the published models.
        depths: encoder blocks in each of the three stages.
        template_size, search_size: sides of the square crops, in pixels.
        template_factor, search_factor: sides of the crops in frame pixels, divided by ``sqrt(w * h)`` of the box.
        widths: channels after the stem and each stage; ``attention_head_dim`` is the channels of one head.
        etm_stages: stages whose search stream is modulated by the template (ETM).
        ope_stages: stages that end in object perception enhancement (OPE).
    """

    name: str
    depths: Tuple[int, int, int]
    template_size: int
    search_size: int
    template_factor: float = 2.0
    search_factor: float = 4.0
    widths: Tuple[int, int, int, int] = (32, 64, 128, 256)
    attention_heads: int = 8
    attention_head_dim: int = 32
    etm_stages: Tuple[int, ...] = (2, 3)
    ope_stages: Tuple[int, ...] = (1, 2, 3)

    @property
    def state_shapes(self) -> Dict[str, Tuple[int, ...]]:
        """Names and shapes (without the batch axis) of the template state, in graph order.

        This is all that the search network needs from the template: for each ETM, the kernels that
        modulate the search stream; and the keys and values of the template's attention tokens.
        """
        shapes: Dict[str, Tuple[int, ...]] = {}
        for stage in self.etm_stages:
            prototypes = self.widths[stage - 1] // 32
            shapes[f"etm{stage}_taps"] = (prototypes, 3)
            shapes[f"etm{stage}_pointwise"] = (prototypes, prototypes)
        tokens = (self.template_size // 16) ** 2
        kv = (self.attention_heads, tokens, self.attention_head_dim)
        return {**shapes, "keys": kv, "values": kv}


VARIANTS: Dict[str, Variant] = {
    "T": Variant("T", (2, 2, 1), 128, 256),
    "S": Variant("S", (2, 2, 3), 128, 256),
    "B": Variant("B", (2, 2, 3), 192, 384),
}


def get_variant(name: str) -> Variant:
    """Returns the published variant called ``name`` (case does not matter); raises ``UsageError`` if there is none."""
    if name.upper() not in VARIANTS:
        raise UsageError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name.upper()]
