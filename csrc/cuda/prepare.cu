// Weights as solve_channels.cu reads them: canonical, masked, in the type of the sums, output channels contiguous and
// padded with zeros to a multiple of 4. With P the pivot and V(a, b) = P^-1 W(a, b):
//
//   premultiply   P^-1 at lag (0, 0) and -V elsewhere      [group][lag][CHANNELS][PADDED]
//
// A column of P^-1 M is a forward substitution, which one warp does: lane l holds outputs l, l + 32, ... At each of the
// CHANNELS steps the finished output goes from its lane to all, and each lane takes it off its own.
//
// Constants beside those of arguments.cuh: PADDED, and THREADS in a block. Arguments: offsets[0] = where to write.
#include "arguments.cuh"

constexpr int kWarps = THREADS / 32;
constexpr int kTaps = KERNEL_H * KERNEL_W;
constexpr int kSlots = ceil_div(CHANNELS, 32);

// Solves P x = values; P(out, k) lies at pivot[k * CHANNELS + out].
__device__ inline void substitute(Accumulator (&values)[kSlots], const Accumulator* pivot) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll 1
    for (int k = slot * 32; k < min(slot * 32 + 32, CHANNELS); ++k) {
      const Accumulator* column = pivot + k * CHANNELS;
      const Accumulator solved = __shfl_sync(0xffffffffu, values[slot], k % 32) / column[k];
#pragma unroll
      for (int i = slot; i < kSlots; ++i) {
        const int out = i * 32 + lane;
        if (out == k) values[i] = solved;
        if (out > k && out < CHANNELS) values[i] -= column[out] * solved;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) premultiply(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* pivot = reinterpret_cast<Accumulator*>(shared_memory);
  constexpr int columns = kTaps * CHANNELS;
  constexpr int blocks = ceil_div(columns, kWarps);
  const int group = blockIdx.x / blocks;
  const auto weight =
      weight_view(static_cast<const SCALAR*>(arguments.second), arguments.second_strides, arguments, group);
  for (int i = threadIdx.x; i < CHANNELS * CHANNELS; i += THREADS) {
    pivot[i] = load_pivot(weight, arguments, group, i % CHANNELS, i / CHANNELS);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int column = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (column >= columns) return;
  const int in = column % CHANNELS, lag = column / CHANNELS;
  const SCALAR* from = weight.data + in * weight.in + lag / KERNEL_W * weight.row + lag % KERNEL_W * weight.column;
  Accumulator values[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int out = i * 32 + lane;
    values[i] = out >= CHANNELS ? 0 : lag == 0 ? out == in : -load(from + out * weight.out);
  }
  substitute(values, pivot);
  Accumulator* to = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[0]) +
                    ((long long)group * columns + column) * PADDED;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int out = i * 32 + lane;
    if (out < PADDED) to[out] = values[i];
  }
}
