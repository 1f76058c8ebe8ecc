"""The crop as one CUDA kernel: window of a frame in, normalised planes out, OpenCV's arithmetic.

The kernel does what ``geometry.Cropper`` and ``HostBackend`` do on the CPU, to the bit of
``cv2.resize``: 11-bit fixed-point weights, the special case of an exact half, the black border, and
the last column and row of the frame that count as border. One thread makes one pixel of all three
planes. The windows lie in device memory, so that a captured graph never has to be captured again.
"""

from __future__ import annotations

from typing import Any, Sequence, Tuple

import numpy as np

from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.manifest import Manifest

#: What the kernel reads of one target: address of the frame's pixel (0, 0), bytes from row to row,
#: size of the frame, first pixel and side of the window.
WINDOW = np.dtype(
    [
        ("pixels", "<u8"),
        ("pitch", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("left", "<i4"),
        ("top", "<i4"),
        ("side", "<i4"),
    ]
)

KERNEL = "asymtrack_crop"

#: Threads of a block: a row of 32 is one warp that writes 128 consecutive bytes of each plane.
BLOCK = (32, 8, 1)

SOURCE = r"""
struct Window { unsigned long long pixels; int pitch, width, height, left, top, side; };

// Position and fixed-point weights of one output coordinate, as cv2.resize computes them.
struct Taps { int first, second; int weight_first, weight_second; };

__device__ Taps taps(int index, int side, int size, bool columns) {
    double scale = 1.0 / ((double)size / side);
    // Not fused: a fused multiply-add rounds once, OpenCV twice.
    float at = (float)__dadd_rn(__dmul_rn(index + 0.5, scale), -0.5);
    int first = (int)floorf(at);
    at -= first;
    // OpenCV takes border columns whole, and mixes a border row with itself.
    if (columns && first < 0) { first = 0; at = 0.0f; }
    if (columns && first >= side - 1) { first = side - 1; at = 0.0f; }
    Taps t;
    t.weight_first = (int)rintf((1.0f - at) * 2048.0f);
    t.weight_second = (int)rintf(at * 2048.0f);
    t.first = min(max(first, 0), side - 1);
    t.second = min(max(first + 1, 0), side - 1);
    return t;
}

// The pixel at (x, y) of the window; the last column and row of the frame are border.
__device__ void fetch(const Window& w, int x, int y, int* bgr) {
    x += w.left;
    y += w.top;
    if (x >= 0 && y >= 0 && x < w.width - 1 && y < w.height - 1) {
        const unsigned char* p =
            (const unsigned char*)(w.pixels + (long long)y * w.pitch + (long long)x * 3);
        bgr[0] = p[0]; bgr[1] = p[1]; bgr[2] = p[2];
    } else {
        bgr[0] = bgr[1] = bgr[2] = 0;
    }
}

extern "C" __global__ void asymtrack_crop(const Window* windows, float* images, int size,
                                          float scale_r, float scale_g, float scale_b,
                                          float offset_r, float offset_g, float offset_b) {
    int x = blockIdx.x * blockDim.x + threadIdx.x;
    int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= size || y >= size) return;
    Window w = windows[blockIdx.z];
    int a[3], b[3], c[3], d[3], out[3];
    if (w.side == size) {
        fetch(w, x, y, out);
    } else if (w.side == 2 * size) {
        // OpenCV averages an exact half.
        fetch(w, 2 * x, 2 * y, a); fetch(w, 2 * x + 1, 2 * y, b);
        fetch(w, 2 * x, 2 * y + 1, c); fetch(w, 2 * x + 1, 2 * y + 1, d);
        for (int k = 0; k < 3; ++k) out[k] = (a[k] + b[k] + c[k] + d[k] + 2) >> 2;
    } else {
        Taps h = taps(x, w.side, size, true), v = taps(y, w.side, size, false);
        fetch(w, h.first, v.first, a); fetch(w, h.second, v.first, b);
        fetch(w, h.first, v.second, c); fetch(w, h.second, v.second, d);
        for (int k = 0; k < 3; ++k) {
            int upper = a[k] * h.weight_first + b[k] * h.weight_second;
            int lower = c[k] * h.weight_first + d[k] * h.weight_second;
            out[k] = ((v.weight_first * (upper >> 4)) >> 16) + ((v.weight_second * (lower >> 4)) >> 16);
            out[k] = (out[k] + 2) >> 2;
        }
    }
    size_t plane = (size_t)size * size;
    float* image = images + blockIdx.z * 3 * plane + (size_t)y * size + x;
    image[0] = __fsub_rn(__fmul_rn((float)out[2], scale_r), offset_r);
    image[plane] = __fsub_rn(__fmul_rn((float)out[1], scale_g), offset_g);
    image[2 * plane] = __fsub_rn(__fmul_rn((float)out[0], scale_b), offset_b);
}
"""


def grid(size: int, targets: int) -> Tuple[int, int, int]:
    """Blocks for crops of ``size`` pixels for so many targets."""
    return -(-size // BLOCK[0]), -(-size // BLOCK[1]), targets


def normalisation(manifest: Manifest) -> Tuple[float, ...]:
    """The kernel's last arguments: factor of red, green and blue, then what is subtracted of each."""
    std = 255.0 * np.asarray(manifest.std, np.float32)
    offset = 255.0 * np.asarray(manifest.mean, np.float32) / std
    return tuple(float(v) for v in (*(1 / std), *offset))


def write_windows(
    out: np.ndarray, windows: Sequence[CropWindow], pixels: int, pitch: int, shape: Sequence[int]
) -> None:
    """Writes what the kernel reads of the windows of one frame.

    Args:
        out: records of type ``WINDOW``, at least as many as windows.
        windows: what to cut.
        pixels: device address of the frame's pixel (0, 0).
        pitch: bytes from row to row.
        shape: of the frame: height, width, ...
    """
    for i, window in enumerate(windows):
        out[i] = (pixels, pitch, shape[1], shape[0], window.left, window.top, window.side)


def covered(windows: Sequence[CropWindow], shape: Sequence[int]) -> Tuple[int, int, int, int]:
    """The part of a frame that any of the windows shows: left, top, right, bottom; empty as zeros."""
    rows, columns = shape[0] - 1, shape[1] - 1  # the last row and column are border
    boxes: Any = [
        (max(w.left, 0), max(w.top, 0), min(w.left + w.side, columns), min(w.top + w.side, rows)) for w in windows
    ]
    boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
    if not boxes:
        return 0, 0, 0, 0
    lefts, tops, rights, bottoms = zip(*boxes)
    return min(lefts), min(tops), max(rights), max(bottoms)
