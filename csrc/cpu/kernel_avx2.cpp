// 256-bit vectors. setup.py compiles this file for AVX2 and FMA.
#if defined(__x86_64__)
#define KCONV_VECTOR_BYTES 32
#include "kernel.h"

namespace kconv {
constexpr Kernels<float> avx2_float = make_kernels<float>(16, 3);
constexpr Kernels<double> avx2_double = make_kernels<double>(16, 3);
}  // namespace kconv
#endif
