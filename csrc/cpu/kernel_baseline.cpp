// 128-bit vectors, which every 64-bit processor has.
#define KCONV_VECTOR_BYTES 16
#include "kernel.h"

namespace kconv {
constexpr Kernels<float> baseline_float = make_kernels<float>(16, 3);
constexpr Kernels<double> baseline_double = make_kernels<double>(16, 3);
}  // namespace kconv
