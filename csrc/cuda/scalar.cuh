// The element types of tensors and the types they are computed in. Half precision computes in float32.
#pragma once

#include <ptx.cuh>  // through the include path, so tests can replace it

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
using Accumulator = AccumulatorOf<SCALAR>::Type;

__device__ inline float load(const float* address) { return *address; }
__device__ inline double load(const double* address) { return *address; }
__device__ inline float load(const Half* address) { return half_to_float(address->bits); }
__device__ inline float load(const BFloat16* address) { return bfloat16_to_float(address->bits); }

__device__ inline void store(float* address, float value) { *address = value; }
__device__ inline void store(double* address, double value) { *address = value; }
__device__ inline void store(Half* address, float value) { address->bits = float_to_half(value); }
__device__ inline void store(BFloat16* address, float value) { address->bits = float_to_bfloat16(value); }

// Copies an element, asynchronously if it needs no conversion: call wait_for_copies() and a barrier before reading it.
template <typename T>
__device__ inline void copy_to_shared(T* shared, const T* global) {
  copy_async(shared, global);
}
__device__ inline void copy_to_shared(float* shared, const Half* global) { *shared = load(global); }
__device__ inline void copy_to_shared(float* shared, const BFloat16* global) { *shared = load(global); }

// Several consecutive values, read and written at once.
template <int COUNT>
struct alignas(COUNT * sizeof(Accumulator)) Vector {
  Accumulator values[COUNT];
};

// Loads COUNT consecutive values, a multiple of WIDTH; the address is aligned to WIDTH values.
template <int WIDTH, int COUNT>
__device__ inline void load_vectors(Accumulator (&values)[COUNT], const Accumulator* shared) {
  static_assert(COUNT % WIDTH == 0, "whole vectors only");
#pragma unroll
  for (int first = 0; first < COUNT; first += WIDTH) {
    const Vector<WIDTH> vector = *reinterpret_cast<const Vector<WIDTH>*>(shared + first);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[first + j] = vector.values[j];
  }
}

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
