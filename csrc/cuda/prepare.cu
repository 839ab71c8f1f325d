// Weights as solve_channels.cu reads them: canonical, masked, in the type of the sums, outputs by four and padded with
// zeros to a multiple of 4, the inputs of a lag in vectors of 16 bytes. With P the pivot and V(a, b) = P^-1 W(a, b):
//
//   premultiply   P^-1 at lag (0, 0) and -V elsewhere      [group][input of a vector][PADDED / 4][lag, vector][4]
//
// A column of P^-1 M is a forward substitution, which one warp does: lane l holds outputs l, l + 32, ... At each of the
// CHANNELS steps, some 40 cycles, the finished output goes from its lane to all, and each lane takes it off its own.
// Predicted by a model for 24, 48 and 64 channels: 2.2, 4.0 and 5.5 thousand cycles on an H100, with divisions and one
// element of the pivot a trip to memory 5.7, 12.3 and 17.1.
//
// More constants than those of arguments.cuh: PADDED, and THREADS in a block. Arguments: offsets[0] = where to write.
#include "arguments.cuh"

constexpr int kWarps = THREADS / 32;
constexpr int kTaps = KERNEL_H * KERNEL_W;
constexpr int kVector = 16 / int(sizeof(Accumulator));
constexpr int kVectors = ceil_div(CHANNELS, kVector);
constexpr int kReads = kTaps * kVectors;
constexpr int kSlots = ceil_div(CHANNELS, 32);
constexpr int kStride = CHANNELS | 1;  // of columns of the pivot, in different banks

// Solves P x = values; P(out, k) lies at pivot[k * kStride + out] for k < out, and 1 / P(out, out) in reciprocals.
__device__ inline void substitute(Accumulator (&values)[kSlots], const Accumulator (&reciprocals)[kSlots],
                                  const Accumulator* pivot) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll 8
    for (int k = slot * 32; k < min(slot * 32 + 32, CHANNELS); ++k) {
      const Accumulator solved = __shfl_sync(0xffffffffu, values[slot] * reciprocals[slot], k % 32);
#pragma unroll
      for (int i = slot; i < kSlots; ++i) {
        const int out = i * 32 + threadIdx.x % 32;
        if (out > k && out < CHANNELS) values[i] -= pivot[k * kStride + out] * solved;
      }
    }
    values[slot] *= reciprocals[slot];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) premultiply(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* pivot = reinterpret_cast<Accumulator*>(shared_memory);
  constexpr int columns = kReads * kVector;
  constexpr int blocks = ceil_div(columns, kWarps);
  const int group = blockIdx.x / blocks;
  const auto weight =
      weight_view(static_cast<const SCALAR*>(arguments.second), arguments.second_strides, arguments, group);
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < CHANNELS * CHANNELS; i += THREADS) {
    const int out = i / CHANNELS, k = i % CHANNELS;
    copy_to_shared(pivot + k * kStride + out, weight.data + out * weight.out + k * weight.in);
  }
  const int column = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  const int in = column % (kVectors * kVector), lag = column / (kVectors * kVector);
  const SCALAR* from = weight.data + in * weight.in + lag / KERNEL_W * weight.row + lag % KERNEL_W * weight.column;
  Accumulator values[kSlots], reciprocals[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int out = i * 32 + lane;
    const bool counts = column < columns && in < CHANNELS && out < CHANNELS;
    values[i] = !counts ? 0 : lag == 0 ? out == in : -load(from + out * weight.out);
    reciprocals[i] = out < CHANNELS ? 1 / load_pivot(weight, arguments, group, out, out) : 0;
  }
  wait_for_copies();
  __syncthreads();
  if (column >= columns) return;
  substitute(values, reciprocals, pivot);
  Accumulator* to = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[0]) +
                    ((long long)group * kVector + column % kVector) * PADDED * kReads + column / kVector * 4;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int out = i * 32 + lane;
    if (out < PADDED) to[out / 4 * 4 * kReads + out % 4] = values[i];
  }
}
