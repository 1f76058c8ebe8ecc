struct Window { unsigned long long pixels; int pitch, width, height, left, top, side, rgb, unused; };

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

// images: float planes (red, green, blue) or, if as_bytes is not 0, interleaved bytes (blue, green, red).
extern "C" __global__ void asymtrack_crop(const Window* windows, void* images, int size, int as_bytes,
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
        // OpenCV averages four pixels when it scales by exactly one half.
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
    if (w.rgb) { int red = out[0]; out[0] = out[2]; out[2] = red; }
    size_t plane = (size_t)size * size;
    size_t at = (size_t)y * size + x;
    if (as_bytes) {
        unsigned char* pixel = (unsigned char*)images + (blockIdx.z * plane + at) * 3;
        for (int k = 0; k < 3; ++k) pixel[k] = (unsigned char)out[k];
        return;
    }
    float* image = (float*)images + blockIdx.z * 3 * plane + at;
    image[0] = __fsub_rn(__fmul_rn((float)out[2], scale_r), offset_r);
    image[plane] = __fsub_rn(__fmul_rn((float)out[1], scale_g), offset_g);
    image[2 * plane] = __fsub_rn(__fmul_rn((float)out[0], scale_b), offset_b);
}
