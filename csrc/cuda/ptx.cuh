// Instructions that CUDA C++ offers only through system headers, which the run-time compiler lacks.
#pragma once

__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline float bfloat16_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// Rounds to nearest even in software, because GPUs before compute capability 8.0 have no instruction for it.
__device__ inline unsigned short float_to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)(bits >> 16 | 0x40u);  // NaN stays one
  return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Copies one element from global to shared memory, asynchronously from compute capability 8.0.
template <typename T>
__device__ inline void copy_async(T* shared, const T* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(sizeof(T)) : "memory");
#else
  *shared = *global;
#endif
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A counter in global memory with which thread blocks wait for each other.
__device__ inline int load_relaxed(const int* address) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// These order the writes of one block before the reads of another; a load invalidates the L1 cache.
__device__ inline int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Returns the same address, to make the compiler keep it in a register. Otherwise it reads the address of shared memory
// from a special register at each use.
template <typename T>
__device__ inline T* kept(T* shared) {
  unsigned address = (unsigned)__cvta_generic_to_shared(shared);
  asm("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// The same number, but the compiler computes what follows from it where it is used, not ahead of a loop, where it would
// take registers all along.
__device__ inline unsigned not_hoisted(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}
