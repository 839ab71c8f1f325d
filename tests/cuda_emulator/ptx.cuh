// In the place of csrc/cuda/ptx.cuh: the same functions in C++.
#pragma once

inline float half_to_float(unsigned short bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? __uint_as_float(0x7fc00000u | (unsigned)fraction << 13) : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24));
}

inline unsigned short float_to_half(float value) {
  const unsigned short sign = __float_as_uint(value) >> 16 & 0x8000;
  if (isnan(value)) return 0x7fff;
  const float size = fabsf(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  // nearbyint rounds to nearest even; a carry into the exponent is right as it is.
  if (size < 0x1p-14f) return sign | (unsigned short)nearbyintf(ldexpf(size, 24));
  const int exponent = ilogbf(size);
  return sign | (unsigned short)(((exponent + 14) << 10) + (int)nearbyintf(ldexpf(size, 10 - exponent)));
}

inline float bfloat16_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

inline unsigned short float_to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  if (isnan(value)) return (unsigned short)(bits >> 16 | 0x40u);
  return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <typename T>
inline void copy_async(T* shared, const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::copy_later(shared, global, sizeof(T));
}

inline void wait_for_copies() { emulator::complete_copies(); }

inline int load_relaxed(const int* address) { return emulator::acquire(address, false); }

template <typename T>
inline T* kept(T* shared) {
  return shared;
}

inline unsigned not_hoisted(unsigned value) { return value; }

inline int load_acquire(const int* address) { return emulator::acquire(address); }

inline void store_release(int* address, int value) { emulator::release(address, value); }
