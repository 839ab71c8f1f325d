// 512-bit vectors and 32 registers. setup.py compiles this file for AVX-512.
#if defined(__x86_64__)
#define KCONV_VECTOR_BYTES 64
#include "kernel.h"

namespace kconv {
constexpr Kernels<float> avx512_float = make_kernels<float>(32, 4);
constexpr Kernels<double> avx512_double = make_kernels<double>(32, 4);
}  // namespace kconv
#endif
