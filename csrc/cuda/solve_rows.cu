// x = A^-1 (y - bias) for few channels: one thread a row and block of output channels, its weights in registers.
//
// With P the pivot, and V(a, b) = P^-1 W(a, b), no channel of a pixel depends on another one of the same pixel:
//
//     x[r, s] = P^-1 y[r, s] - sum_{(a, b) != (0, kRight)} V(a, b) x[r - a, s + kRight - b]
//
// Thread (row, part) walks along its row, a step behind the thread above it. Every new pixel that it reads, its own
// last one and those above, is at once added to the KERNEL_W pending sums it takes part in, so that a step reads
// KERNEL_H pixels, not KERNEL_H * KERNEL_W. Only two of those pixels are as young as the last step; everything else of
// the next step's sum, y's share too, is added before the barrier, while other threads still write.
//
// What bounds it: H + W - 1 steps in sequence. A step must take a trip through shared memory, 2 CHANNELS multiply-adds
// one after another and a barrier, about 100 cycles, and issue KERNEL_H KERNEL_W CHANNELS OUTPUTS multiply-adds beside
// some 30 other instructions. For (100, 12, 16, 16) in four groups that is 31 steps of 90 instructions, each warp with
// a scheduler to itself, 2 us at 1.7 GHz after a launch and a trip to memory; its 2.4 MB take 0.8 us at 3 TB/s. A
// prediction, not a measurement.
//
// Constants beside those of band.cuh:
//   OUTPUTS   channels that a thread computes
//   PARTS     threads a row: ceil(CHANNELS / OUTPUTS)
//   BLOCKS    thread blocks that a multiprocessor should hold at once
#include "band.cuh"

constexpr int kTaps = KERNEL_H * KERNEL_W;
constexpr int kColumns = kTaps * CHANNELS;
constexpr int kValues = kVectors * kVector;
constexpr int kEarlyPixels = KERNEL_H > 2 ? KERNEL_H - 1 : 1;
// A step's reads all at once hide each other's time, as far as there are registers beside the weights.
constexpr bool kReadAhead = kValues * (KERNEL_H + 1) * int(sizeof(Accumulator)) <= 128;

// The pixel's channels in 16-byte reads.
__device__ inline void read_pixel(const Accumulator* pixel, Accumulator (&values)[kValues]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const PixelVector vector = reinterpret_cast<const PixelVector*>(pixel)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[i * kVector + j] = vector.values[j];
  }
}

// Writes P^-1 at the pivot and -V elsewhere to premultiplied[column][CHANNELS], column = (a KERNEL_W + b) CHANNELS +
// i: forward substitution with P for each column, one thread a column.
__device__ inline void premultiply(const Arguments& arguments, int group, Accumulator* pivot,
                                   Accumulator* premultiplied) {
  const auto weight =
      weight_view(static_cast<const SCALAR*>(arguments.second), arguments.second_strides, arguments, group);
  for (int first = 0; first < kColumns; first += THREADS) {
    const int column = first + threadIdx.x;
    const int in = column % CHANNELS, b = column / CHANNELS % KERNEL_W, a = column / (CHANNELS * KERNEL_W);
    const bool at_pivot = column / CHANNELS == kRight;
    Accumulator values[CHANNELS] = {};
    if (column < kColumns) {
#pragma unroll
      for (int out = 0; out < CHANNELS; ++out) {
        const SCALAR* from = weight.data + out * weight.out + in * weight.in + a * weight.row + b * weight.column;
        values[out] = at_pivot ? Accumulator(out == in) : -load(from);
      }
    }
    if (first == 0) {
      // While the column is on its way.
      for (int i = threadIdx.x; i < CHANNELS * CHANNELS; i += THREADS) {
        const int out = i % CHANNELS, k = i / CHANNELS;
        const Accumulator value = load_pivot(weight, arguments, group, out, k);
        pivot[i] = out == k ? 1 / value : value;
      }
      __syncthreads();
    }
    if (column < kColumns) {
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
        values[k] *= pivot[k * CHANNELS + k];
#pragma unroll
        for (int out = k + 1; out < CHANNELS; ++out) values[out] -= pivot[k * CHANNELS + out] * values[k];
        premultiplied[column * CHANNELS + k] = values[k];
      }
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) solve_rows(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  const Band band(arguments, shared_memory);
  band.fetch(0);

  Accumulator* pivot = reinterpret_cast<Accumulator*>(shared_memory + kBandBytes);
  Accumulator* premultiplied = pivot + CHANNELS * CHANNELS;
  premultiply(arguments, band.place.group, pivot, premultiplied);
  const int row = threadIdx.x % ROWS, first_output = PARTS == 1 ? 0 : threadIdx.x / ROWS * OUTPUTS;
  const bool active = threadIdx.x < ROWS * PARTS;
  Accumulator weights[KERNEL_H][KERNEL_W][CHANNELS][OUTPUTS];
#pragma unroll
  for (int a = 0; a < KERNEL_H; ++a) {
#pragma unroll
    for (int b = 0; b < KERNEL_W; ++b) {
#pragma unroll
      for (int in = 0; in < CHANNELS; ++in) {
        const Accumulator* column = premultiplied + ((a * KERNEL_W + b) * CHANNELS + in) * CHANNELS;
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
          const int out = first_output + k;
          weights[a][b][in][k] = active && out < CHANNELS ? column[out] : 0;
        }
      }
    }
  }

  Accumulator sums[KERNEL_W][OUTPUTS] = {};  // of the pixels at column, column + 1, ...
  // Adds pixel (row - a, column + kRight - first) to the sums that it takes part in.
  const auto add = [&](const Accumulator(&values)[kValues], int a, int first) {
#pragma unroll
    for (int b = first; b < KERNEL_W; ++b) {
#pragma unroll
      for (int in = 0; in < CHANNELS; ++in) {
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) sums[b - first][k] += weights[a][b][in][k] * values[in];
      }
    }
  };
  // What was known a step before: y, and the pixels two rows and more above.
  Accumulator early[kEarlyPixels][kValues];
  const auto read_early = [&](int chunk, int time) {
    read_pixel(band.given_at(chunk, row, time), early[0]);
#pragma unroll
    for (int a = 2; a < KERNEL_H; ++a) read_pixel(band.solved_at(row - a, time + kRight - TAU * a), early[a - 1]);
  };
  const auto add_early = [&] {
#pragma unroll
    for (int a = 2; a < KERNEL_H; ++a) add(early[a - 1], a, 0);
#pragma unroll
    for (int in = 0; in < CHANNELS; ++in) {
#pragma unroll
      for (int k = 0; k < OUTPUTS; ++k) {
        // With one part the triangle is known here, and its zeros cost nothing.
        if (PARTS > 1 || in <= k) sums[0][k] += weights[0][kRight][in][k] * early[0][in];
      }
    }
  };

  band.run([&](int chunk, int steps) {
    if (active) {
      read_early(chunk, 0);
      add_early();
    }
    const int first_column = chunk * STEPS - kLead - TAU * row;
    for (int time = 0; time < steps; ++time) {
      if (active) {
        Accumulator left[kValues], above[kValues];
        if (KERNEL_W > kRight + 1) read_pixel(band.solved_at(row, time - 1), left);
        if (KERNEL_H > 1) read_pixel(band.solved_at(row - 1, time - 1), above);
        const bool next = time + 1 < steps;
        if (kReadAhead && next) read_early(chunk, time + 1);
        if (KERNEL_W > kRight + 1) add(left, 0, kRight + 1);
        if (KERNEL_H > 1) add(above, 1, 0);

        // Outside the image x is zero, whatever has been added up; to the right of it only a side reads.
        const int column = first_column + time;
        const bool inside = column >= 0 && (!kRight || column < arguments.width);
        Accumulator* pixel = band.solved_at(row, time) + first_output;
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
          if (PARTS * OUTPUTS == CHANNELS || first_output + k < CHANNELS) pixel[k] = inside ? sums[0][k] : 0;
        }
#pragma unroll
        for (int b = 0; b < KERNEL_W; ++b) {
#pragma unroll
          for (int k = 0; k < OUTPUTS; ++k) sums[b][k] = b + 1 < KERNEL_W ? sums[b + 1][k] : 0;
        }
        if (!kReadAhead && next) read_early(chunk, time + 1);
        if (next) add_early();
      }
      synchronize();
    }
  });
}
