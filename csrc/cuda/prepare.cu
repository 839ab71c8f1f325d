// Prepares weights for solve_channels.cu and solve_tiles.cu: canonical, masked, in the type of the sums, outputs in
// fours padded with zeros, the inputs of a lag in vectors of 16 bytes. With P the pivot and V(a, b) = P^-1 W(a, b):
//
//   premultiply   P^-1 at lag (0, 0) and -V elsewhere      [group][input of a vector][PADDED / 4][lag, vector][4]
//
// One warp computes a column of P^-1 M by forward substitution, or COLUMNS at once if the pivot is large: lane l holds
// outputs l, l + 32, ... At each of the CHANNELS steps the finished output goes from its lane to all, which subtract
// its product from their own. Predicted by a model for 24, 48 and 64 channels: 2.4, 4.3 and 5.7 thousand cycles on an
// H100, for 128 and 256: 23 and 61; one column at once: 85 for 256.
//
// Constants in addition to those of arguments.cuh: PADDED, outputs written; VECTORS, vectors of inputs; THREADS per
// block; COLUMNS; PANEL, columns of the pivot in shared memory at once, CHANNELS or 32; PITCH, values from one of these
// to the next. Arguments: offsets[0] = where to write.
#include "arguments.cuh"

constexpr int kWarps = THREADS / 32;
constexpr int kTaps = KERNEL_H * KERNEL_W;
constexpr int kVector = 16 / int(sizeof(Accumulator));
constexpr int kReads = kTaps * VECTORS;
constexpr int kSlots = ceil_div(CHANNELS, 32), kUnrolled = kSlots > 2 ? 2 : 8;

extern "C" __global__ void __launch_bounds__(THREADS, 1) premultiply(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* pivot = reinterpret_cast<Accumulator*>(shared_memory);
  constexpr int columns = kReads * kVector, blocks = ceil_div(columns, kWarps * COLUMNS);
  const int group = blockIdx.x / blocks;
  const auto weight =
      weight_view(static_cast<const SCALAR*>(arguments.second), arguments.second_strides, arguments, group);
  const int lane = threadIdx.x % 32, first_column = (blockIdx.x % blocks * kWarps + int(threadIdx.x) / 32) * COLUMNS;
  Accumulator values[kSlots][COLUMNS], diagonal[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int out = i * 32 + lane;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int in = (first_column + c) % (VECTORS * kVector), lag = (first_column + c) / (VECTORS * kVector);
      const SCALAR* from = weight.data + in * weight.in + lag / KERNEL_W * weight.row + lag % KERNEL_W * weight.column;
      const bool counts = first_column + c < columns && in < CHANNELS && out < CHANNELS;
      values[i][c] = !counts ? 0 : lag == 0 ? out == in : -load(from + out * weight.out);
    }
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int out = i * 32 + lane;
    diagonal[i] = out < CHANNELS ? load_pivot(weight, arguments, group, out, out) : 1;
  }
  // Solves P x = values; P(out, k) is pivot[k % PANEL * PITCH + out] for k < out.
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot == 0 || (PANEL < CHANNELS && slot * 32 % PANEL == 0)) {
      if (slot > 0) __syncthreads();
      for (int i = threadIdx.x; i < (CHANNELS - slot * 32) * PANEL; i += THREADS) {
        const int out = slot * 32 + i / PANEL, k = slot * 32 + i % PANEL;
        if (k < out) copy_to_shared(pivot + i % PANEL * PITCH + out, weight.data + out * weight.out + k * weight.in);
      }
      wait_for_copies();
      __syncthreads();
    }
    const Accumulator reciprocal = 1 / diagonal[slot];
#pragma unroll kUnrolled
    for (int k = slot * 32; k < min(slot * 32 + 32, CHANNELS); ++k) {
      Accumulator solved[COLUMNS];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) solved[c] = __shfl_sync(0xffffffffu, values[slot][c] * reciprocal, k % 32);
#pragma unroll
      for (int i = slot; i < kSlots; ++i) {
        const int out = i * 32 + lane;
        if ((i > slot || out > k) && (CHANNELS % 32 == 0 || out < CHANNELS)) {
          const Accumulator factor = pivot[k % PANEL * PITCH + out];
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c) values[i][c] -= factor * solved[c];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) values[slot][c] *= reciprocal;
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = first_column + c;
    Accumulator* to = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[0]) +
                      ((long long)group * kVector + column % kVector) * PADDED * kReads + column / kVector * 4;
#pragma unroll
    for (int i = 0; i < ceil_div(PADDED, 32); ++i) {
      const int out = i * 32 + lane;
      const Accumulator value = i < kSlots ? values[min(i, kSlots - 1)][c] : 0;
      if (column < columns && out < PADDED) to[out / 4 * 4 * kReads + out % 4] = value;
    }
  }
}
