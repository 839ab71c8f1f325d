// x = A^-1 (y - bias) for some tens of channels: the weights of a group spread over the registers of a thread block.
//
// With P the pivot and V(a, b) = P^-1 W(a, b), which `premultiply` has computed, a pixel is one product with a long
// vector: its own y and the pixels that it reads,
//
//     x[r, s] = P^-1 y[r, s] - sum_{(a, b) != (0, 0)} V(a, b) x[r - a, s - b]
//
// Thread (replica, block of 4 outputs, slice) holds 4 rows of that product's matrix for every SLICES-th 16-byte vector
// of input channels, reads these vectors of a pixel, and the SLICES lanes add up their sums by shuffles. Replicas take
// different pixels of the anti-diagonal.
//
// What bounds it: the multiply-adds, at 16 for every 16-byte read of shared memory, on one SM an image. For
// (100, 48, 8, 8) in one group 64 * 48 * 432 / 128 = 10 400 cycles, 6 us at 1.7 GHz; the reads, the shuffles and
// replicas without a pixel at the ends of the diagonals should about double it: a prediction, not a measurement.
//
// Constants beside those of band.cuh:
//   SLICES, VECTORS_EACH   SLICES * VECTORS_EACH >= the vectors of the product, SLICES a power of 2 from 4 to 32
//   REPLICAS               THREADS / REPLICAS is a multiple of 32
//   BLOCKS                 thread blocks that a multiprocessor should hold at once
//   PADDED                 CHANNELS rounded up to a multiple of 4
// Arguments: offsets[2] = what premultiply wrote.
#include "band.cuh"

constexpr int kTaps = KERNEL_H * KERNEL_W;
constexpr int kReads = kTaps * kVectors;
constexpr unsigned kWarp = 0xffffffffu;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    solve_channels(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  const Band band(arguments, shared_memory, CHANNELS % kVector != 0);
  band.fetch(0);

  const int replica = threadIdx.x / (THREADS / REPLICAS);
  const int in_replica = threadIdx.x % (THREADS / REPLICAS);
  const int slice = in_replica % SLICES, first_output = in_replica / SLICES * 4;
  Accumulator weights[VECTORS_EACH][kVector][4];
  int offsets[VECTORS_EACH];  // of what is read, from the pixel to solve or its y, in bytes
  const Accumulator* premultiplied = reinterpret_cast<const Accumulator*>(arguments.scratch + arguments.offsets[2]) +
                                     (long long)band.place().group * kTaps * CHANNELS * PADDED;
#pragma unroll
  for (int i = 0; i < VECTORS_EACH; ++i) {
    const int read = i * SLICES + slice, lag = read / kVectors, first_input = read % kVectors * kVector;
    const int a = lag / KERNEL_W, b = lag % KERNEL_W;
    offsets[i] = (first_input - a * kRowSize - (a + b) * kPitch) * int(sizeof(Accumulator));
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const Accumulator* from = premultiplied + (lag * CHANNELS + first_input + j) * PADDED + first_output;
      const bool counts = read < kReads && first_input + j < CHANNELS && first_output < CHANNELS;
#pragma unroll
      for (int k = 0; k < 4; ++k) weights[i][j][k] = counts ? from[k] : 0;
    }
  }

  // After the exchanges with the lanes SLICES / 2 and SLICES / 4 away, a lane adds up one output alone.
  const bool upper_pair = slice & SLICES / 2, upper_output = slice & SLICES / 4;
  const int output = first_output + 2 * upper_pair + upper_output;
  const bool writes = slice % (SLICES / 4) == 0 && output < CHANNELS;

  band.run([&](int chunk, int steps) {
    for (int time = 0; time < steps; ++time) {
      const int diagonal = chunk * STEPS + time;
      const int last_row = min(band.rows - 1, diagonal);
      for (int row = max(0, diagonal - arguments.width + 1) + replica; row <= last_row; row += REPLICAS) {
        Accumulator* pixel = band.solved_at(row, time);
        const Accumulator* given_pixel = band.given_at(chunk, row, time);
        Accumulator sums[4] = {};
#pragma unroll
        for (int i = 0; i < VECTORS_EACH; ++i) {
          const int read = i * SLICES + slice;
          if ((i + 1) * SLICES > kReads && read >= kReads) continue;
          const bool given = i * SLICES < kVectors && read < kVectors;
          const char* from = reinterpret_cast<const char*>(given ? given_pixel : pixel) + offsets[i];
          const PixelVector vector = *reinterpret_cast<const PixelVector*>(from);
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[k] += weights[i][j][k] * vector.values[j];
          }
        }
        Accumulator pair[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          pair[k] = upper_pair ? sums[2 + k] : sums[k];
          pair[k] += __shfl_xor_sync(kWarp, upper_pair ? sums[k] : sums[2 + k], SLICES / 2);
        }
        Accumulator sum = upper_output ? pair[1] : pair[0];
        sum += __shfl_xor_sync(kWarp, upper_output ? pair[0] : pair[1], SLICES / 4);
#pragma unroll
        for (int lanes = SLICES / 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
        if (writes) pixel[output] = sum;
      }
      synchronize();
    }
  });
}
