"""What an export will contain, as a manifest without files."""

from __future__ import annotations

from asymtrack_edge.export.split import IMAGE, OUTPUT
from asymtrack_edge.manifest import UINT8_BGR, Manifest, TensorSpec
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, Variant


def describe(variant: Variant, precision: str, target: str, opset: int, max_batch: int, input_format: str) -> Manifest:
    """Describes the tensors of an export; files, provenance and verification are left empty.

    In an fp16 export the kernels of ETM stay fp32: they are computed and used there.
    """

    def image(size: int) -> TensorSpec:
        if input_format == UINT8_BGR:
            return TensorSpec(IMAGE, "uint8", (size, size, 3))
        return TensorSpec(IMAGE, "float32", (3, size, size))

    def state_dtype(name: str) -> str:
        return "float16" if precision == "fp16" and not name.startswith("etm") else "float32"

    return Manifest(
        variant=variant.name,
        precision=precision,
        target=target,
        opset=opset,
        max_batch=max_batch,
        input_format=input_format,
        template=image(variant.template_size),
        search=image(variant.search_size),
        state=tuple(TensorSpec(name, state_dtype(name), shape) for name, shape in variant.state_shapes.items()),
        output=TensorSpec(OUTPUT, "float32", (5,)),
        template_factor=variant.template_factor,
        search_factor=variant.search_factor,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        files={},
    )
