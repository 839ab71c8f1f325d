// The part of CUDA C++ that the kernels use, as ordinary C++. Threads are fibers, see emulator.cpp.
#pragma once

// The C header, because the C++ one would take a third of a kernel's compile time.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// An operation whose memory accesses never race.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread")))

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// A point where the threads of a warp or block meet; all of them must be at the same one.
enum class Meeting { kSyncwarp, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kAny, kAll };
enum class Barrier { kPlain, kOr, kAnd, kCount };

// What a thread gets when the lanes have met.
struct Exchange {
  uint64_t value;         // of the lane that it asked for
  unsigned participants;  // lanes with values
  unsigned nonzero;       // those whose value is not zero
};

// Waits for the other lanes in the mask.
Exchange meet(Meeting meeting, unsigned mask, int detail, uint64_t value, int from, int line);
// Waits for all threads of the block; returns how many passed true.
int wait(Barrier barrier, bool predicate, int line);
// Lets other threads run before a read of memory that they may change.
void poll();
// Signals a change of memory that others may wait for.
void progress();
// For counters with which blocks wait for each other. `learns` the knowledge of the value's writer.
int acquire(const int* address, bool learns = true);
void release(int* address, int value);
// Copies now or at complete_copies, as hardware may.
void copy_later(void* target, const void* source, int size);
void complete_copies();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Arguments from Python.
struct Launch {
  unsigned grid[3];
  unsigned block;
  int shared;
  int output_element;  // bytes
  void* output;
  long long output_size;
  void* scratch;
  long long scratch_size;
  const void* arguments;
  long long seed;
  char* error;
  long long error_size;
};

// Runs all blocks; returns false with an error if they break a rule.
bool execute(void (*kernel)(const void*), const Launch& launch);

template <typename T>
EMULATOR_UNCHECKED T shuffle(Meeting meeting, unsigned mask, T value, int operand, int width, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no shuffle for this type");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle of width %d in line %d", width, line);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const int lane = threadIdx.x % 32, first = lane & -width;
  int from = 0;
  switch (meeting) {
    case Meeting::kShuffle:
      from = first + (operand & (width - 1));
      break;
    case Meeting::kShuffleUp:
      from = lane - operand < first ? lane : lane - operand;
      break;
    case Meeting::kShuffleDown:
      from = lane + operand >= first + width ? lane : lane + operand;
      break;
    default:
      from = (lane ^ operand) >= first + width ? lane : lane ^ operand;
  }
  const Exchange all = meet(meeting, mask, width * 16 + sizeof(T), bits, from, line);
  if (!(all.participants >> from & 1)) {
    fail("the shuffle in line %d reads lane %d, which does not take part (mask %08x)", line, from, all.participants);
  }
  memcpy(&value, &all.value, sizeof(T));
  return value;
}

EMULATOR_UNCHECKED inline unsigned ballot(Meeting meeting, unsigned mask, bool predicate, int line) {
  return meet(meeting, mask, 0, predicate, 0, line).nonzero;
}

}  // namespace emulator

constexpr int warpSize = 32;

#define EMULATOR_VECTORS(T, name)                                                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(long long, longlong)
#undef EMULATOR_VECTORS

#define EMULATOR_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
// A template, because <cmath>, which emulator.cpp includes, has such a function.
template <typename T>
inline T exp(T x) {
  static_assert(std::is_same_v<T, float>, "exp of C is for double");
  return expf(x);
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t)a * b >> 32); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// A line, not a return address, identifies a meeting, because the compiler may copy and merge code.
inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait(emulator::Barrier::kPlain, false, line); }
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emulator::wait(emulator::Barrier::kOr, predicate, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return emulator::wait(emulator::Barrier::kAnd, predicate, line) == (int)blockDim.x;
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return emulator::wait(emulator::Barrier::kCount, predicate, line);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulator::meet(emulator::Meeting::kSyncwarp, mask, 0, 0, 0, line);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(emulator::Meeting::kShuffle, mask, value, lane, width, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(emulator::Meeting::kShuffleUp, mask, value, distance, width, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(emulator::Meeting::kShuffleDown, mask, value, distance, width, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(emulator::Meeting::kShuffleXor, mask, value, lanes, width, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulator::ballot(emulator::Meeting::kBallot, mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulator::ballot(emulator::Meeting::kAny, mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulator::ballot(emulator::Meeting::kAll, mask, !predicate, line) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::poll(); }
template <typename T>
EMULATOR_UNCHECKED T atomicAdd(T* address, std::common_type_t<T> value) {
  const T before = *address;
  *address = before + value;
  emulator::progress();
  return before;
}
