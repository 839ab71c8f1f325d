// x = A^-1 (y - bias) for some tens of channels, with the weights of a group spread over the registers of a thread
// block.
//
// With P the pivot and V(a, b) = P^-1 W(a, b), which `premultiply` has computed, a pixel is one product with a long
// vector, its own y and the pixels that it reads:
//
//     x[r, s] = P^-1 y[r, s] - sum_{(a, b) != (0, 0)} V(a, b) x[r - a, s - b]
//
// Thread (replica, block of 4 outputs, slice) holds 4 rows of that product's matrix for every SLICES-th 16-byte vector
// of input channels and reads these vectors of a pixel; SLICES lanes then add up their sums by shuffles. Replicas take
// different rows of the anti-diagonal, up to four at a time if they have several.
//
// The bound is instructions, 50 to 83 % of them multiply-adds, with one SM per image; for short diagonals it is the 450
// cycles of a step. Predicted by a model of an H100 for batch 100 in one group, with premultiply, in a graph: 24
// channels at 8 x 8 10.9 us, 48 at 4 x 4 10.0, 24 at 16 x 16 23.6, 48 at 8 x 8 18.7, 64 at 16 x 16 71; with two rows at
// a time 11.2, 10.2, 25.4, 19.2 and 77.
//
// Constants in addition to those of band.cuh:
//   SLICES, VECTORS_EACH   SLICES * VECTORS_EACH >= the vectors of the product, SLICES a power of 2 from 4 to 32
//   REPLICAS               THREADS / REPLICAS is a multiple of 32
//   BLOCKS                 thread blocks that a multiprocessor should hold at once
//   PADDED                 CHANNELS rounded up to a multiple of 4
// Arguments: offsets[2] = what premultiply wrote.
#include "band.cuh"

constexpr int kTaps = KERNEL_H * KERNEL_W;
constexpr int kReads = kTaps * kVectors;
// What a replica solves at once. Addresses in bands take registers, too: with many weights four pixels would spill.
constexpr int kFitting = BANDED && VECTORS_EACH > 4 ? 2 : 4, kShare = ceil_div(ROWS, REPLICAS);
constexpr int kMostPixels = kShare < kFitting ? kShare : kFitting;
constexpr unsigned kWarp = 0xffffffffu;

using Weights = Accumulator[VECTORS_EACH][kVector][4];

// Adds up the COUNT sums of 2 LANES lanes; afterwards a lane holds those from the returned one on. At each exchange it
// passes on half of its sums, while it has several, and adds to the other half.
template <int LANES, int COUNT>
__device__ inline int exchange(Accumulator* sums, int slice) {
  if constexpr (LANES == 0) {
    return 0;
  } else {
    const bool upper = slice & LANES;
    constexpr int half = COUNT / 2, held = half ? half : 1;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      const Accumulator other = __shfl_xor_sync(kWarp, upper ? sums[k] : sums[half + k], LANES);
      sums[k] = (upper ? sums[half + k] : sums[k]) + other;
    }
    return (upper ? half : 0) + exchange<LANES / 2, held>(sums, slice);
  }
}

// Solves a pixel and those in the next rows of the replica: PIXELS, or as many as `rows` has, the rows from this one to
// the last. Inputs are at offsets from the pixel or from its y.
template <int PIXELS>
__device__ inline void solve(const Weights& weights, const int (&offsets)[VECTORS_EACH], Accumulator* pixel,
                             const Accumulator* given_pixel, int rows, int slice, int first_output) {
  if constexpr (PIXELS > 1) {
    if (rows <= (PIXELS - 1) * REPLICAS) {
      return solve<PIXELS - 1>(weights, offsets, pixel, given_pixel, rows, slice, first_output);
    }
  }
  constexpr int count = PIXELS == 3 ? 16 : PIXELS * 4, held = count > SLICES ? count / SLICES : 1;
  Accumulator sums[count] = {};
#pragma unroll
  for (int i = 0; i < VECTORS_EACH; ++i) {
    const bool given = i * SLICES < kVectors && min(i * SLICES + slice, kReads - 1) < kVectors;
    const char* from = reinterpret_cast<const char*>(given ? given_pixel : pixel) + offsets[i];
    const int row = (given ? kGivenRowSize : kRowSize) / kVector;
#pragma unroll
    for (int p = 0; p < PIXELS; ++p) {
      const PixelVector vector = reinterpret_cast<const PixelVector*>(from)[p * REPLICAS * row];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[4 * p + k] += weights[i][j][k] * vector.values[j];
      }
    }
  }
  const int sum = exchange<SLICES / 2, count>(sums, slice);
#pragma unroll
  for (int k = 0; k < held; ++k) {
    const int output = first_output + sum % 4 + k;
    const bool writes = slice % max(1, SLICES / count) == 0 && output < CHANNELS && sum < PIXELS * 4;
    if (writes) pixel[sum / 4 * REPLICAS * kRowSize + output] = sums[k];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    solve_channels(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Band band(arguments, shared_memory, CHANNELS % kVector != 0);
  band.solved = kept(band.solved);
  band.fetch(0);

  const int replica = threadIdx.x / (THREADS / REPLICAS);
  const int in_replica = threadIdx.x % (THREADS / REPLICAS);
  const int slice = threadIdx.x % SLICES, first_output = in_replica / SLICES * 4;
  Weights weights;
  int offsets[VECTORS_EACH];  // of inputs, from the pixel to solve or its y, in bytes
  const Accumulator* premultiplied = reinterpret_cast<const Accumulator*>(arguments.scratch + arguments.offsets[2]) +
                                     ((long long)band.place().group * kVector * PADDED + first_output) * kReads;
#pragma unroll
  for (int i = 0; i < VECTORS_EACH; ++i) {
    // Weights beyond the product are zero, and their inputs are finite if the sum is.
    const int read = min(i * SLICES + slice, kReads - 1), lag = read / kVectors, a = lag / KERNEL_W;
    // That is -(a kRowSize + (a + b) PITCH) for b = lag % KERNEL_W.
    offsets[i] = (read % kVectors * kVector - lag * PITCH - a * (kRowSize + PITCH - KERNEL_W * PITCH)) *
                 int(sizeof(Accumulator));
    const bool counts = i * SLICES + slice < kReads && first_output < PADDED;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const Vector<4>* from = reinterpret_cast<const Vector<4>*>(premultiplied + j * PADDED * kReads) + read;
      const Vector<4> outputs = counts ? *from : Vector<4>{};
#pragma unroll
      for (int k = 0; k < 4; ++k) weights[i][j][k] = outputs.values[k];
    }
  }

  int first_row = replica;  // first row to solve
  band.run([&](int chunk, int steps) {
    for (int time = 0; time < steps; ++time) {
      const int diagonal = chunk * STEPS + time, last_row = min(band.rows - 1, diagonal);
      if (diagonal - first_row == arguments.width) first_row += REPLICAS;
      for (int row = first_row; row <= last_row; row += kMostPixels * REPLICAS) {
        solve<kMostPixels>(weights, offsets, band.solved_at(row, time), band.given_at(chunk, row, time),
                           last_row + 1 - row, slice, first_output);
      }
      synchronize();
    }
  });
}
