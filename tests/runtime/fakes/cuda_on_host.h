// The part of CUDA that the crop kernel needs to run on the host, one thread after the other.
#include <cmath>
#include <cstddef>
#include <algorithm>
using std::max;
using std::min;
struct Index { int x, y, z; };
static Index blockIdx, threadIdx, blockDim;
#define __global__
#define __device__ static
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
