// x = A^-1 (y - bias) for few channels, with one thread per row and output channel and its weights in registers.
//
// With P the pivot and V(a, b) = P^-1 W(a, b), no channel of a pixel depends on another channel of the same pixel:
//
//     x[r, s] = P^-1 y[r, s] - sum_{(a, b) != (0, kRight)} V(a, b) x[r - a, s + kRight - b]
//
// Thread (row, output channel) goes along its row, one step behind the threads of the row above. It adds every new
// pixel that it reads, its own last one and those above, at once to the KERNEL_W pending sums that need it, so a step
// reads KERNEL_H pixels, not KERNEL_H * KERNEL_W. A step has no branches, because reconverging costs a warp some 40
// cycles: a thread without a pixel reads zeros. Warps without any pixel skip several steps at once.
//
// The bound is TAU (H - 1) + W sequential steps of some 110 cycles: an access to shared memory, 3 CHANNELS dependent
// multiply-adds and a barrier. It holds unless the KERNEL_H KERNEL_W CHANNELS multiply-adds and 20 other instructions
// of all warps of a scheduler take longer. Predicted by a model of an H100 for 3 x 3 in float32, as a node of a graph,
// in microseconds: four groups, batch 100: 12 x 16^2 5.1, 24 x 8^2 4.4, 48 x 4^2 4.8, 12 x 32^2 9.2, 24 x 16^2 7.4,
// 48 x 8^2 8.0, 12 x 64^2 35; one group: 12 x 16^2 7.8, 12 x 32^2 18; one image: 12 x 16^2 4.9, 12 x 64^2 15,
// 12 x 256^2 131.
//
// Constants in addition to those of band.cuh:
//   BLOCKS    thread blocks that a multiprocessor should hold at once
//   PIVOT     values of the pivot in shared memory, before its products
#include "band.cuh"

constexpr int kColumns = KERNEL_H * KERNEL_W * CHANNELS;

// Writes P^-1 at the pivot and -V elsewhere to premultiplied[column][CHANNELS], column = (a KERNEL_W + b) CHANNELS + i,
// by forward substitution with P, one thread per column.
__device__ inline void premultiply(const Band& band, Accumulator* pivot, Accumulator* premultiplied) {
  const Arguments& arguments = band.arguments;
  const int group = band.place().group;
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
        values[out] = at_pivot ? -Accumulator(out == in) : load(from);
      }
    }
    if (first == 0) {
      // Runs while the column is being loaded.
      constexpr int kOwn = ceil_div(CHANNELS * CHANNELS, THREADS);
      Accumulator own[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int i = min(j * THREADS + int(threadIdx.x), CHANNELS * CHANNELS - 1);
        own[j] = load_pivot(weight, arguments, group, i % CHANNELS, i / CHANNELS);
      }
      band.fetch(0);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int i = j * THREADS + threadIdx.x;
        if (i < CHANNELS * CHANNELS) pivot[i] = i % CHANNELS == i / CHANNELS ? 1 / own[j] : own[j];
      }
      __syncthreads();
    }
    if (column < kColumns) {
#pragma unroll
      for (int k = 0; k < CHANNELS; ++k) {
        values[k] *= pivot[k * CHANNELS + k];
#pragma unroll
        for (int out = k + 1; out < CHANNELS; ++out) values[out] -= pivot[k * CHANNELS + out] * values[k];
        premultiplied[column * CHANNELS + k] = -values[k];
      }
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) solve_rows(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  const Band band(arguments, shared_memory, false);
  Accumulator* pivot = reinterpret_cast<Accumulator*>(shared_memory + BAND_BYTES);
  Accumulator* premultiplied = pivot + PIVOT;
  premultiply(band, pivot, premultiplied);

  // Neighbouring lanes read the same pixels.
  const int row = threadIdx.x / CHANNELS, out = threadIdx.x % CHANNELS;
  const bool active = row < band.rows;
  Accumulator weights[KERNEL_H][KERNEL_W][CHANNELS];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    weights[i / (KERNEL_W * CHANNELS)][i / CHANNELS % KERNEL_W][i % CHANNELS] = premultiplied[i * CHANNELS + out];
  }
  Accumulator sums[KERNEL_W] = {};  // for the pixels at column, column + 1, ...
  // Reads the pixel of tap (a, first) and adds it to the sums that need it, to `sum` instead of the first.
  const auto add = [&](const Accumulator* pixel, int a, int first, Accumulator& sum) {
    Accumulator values[kVectors * kVector];
    load_vectors<kVector>(values, pixel - a * kRowSize + (kRight - first - TAU * a) * PITCH);
#pragma unroll
    for (int b = first; b < KERNEL_W; ++b) {
#pragma unroll
      for (int in = 0; in < CHANNELS; ++in) (b > first ? sums[b - first] : sum) += weights[a][b][in] * values[in];
    }
  };

  band.run([&](int chunk, int) {
    const int width = CHUNKED ? arguments.width : kWidth;
    const int first_column = chunk * STEPS - kLead - TAU * row;
    // The steps at which a row of this warp is in the image, or to the right of it, where others read zeros.
    const int first_lane = threadIdx.x & ~31, last_row = min((first_lane + 31) / CHANNELS, ROWS - 1);
    const int begin = kLead + TAU * (first_lane / CHANNELS) - kRight - chunk * STEPS;
    const int end = kLead + TAU * last_row + width + (CHUNKED ? kRight : 0) - chunk * STEPS;
    for (int start = 0; start < STEPS; start += STRETCH) {
      if (start + STRETCH <= begin || start >= end) {
        for (int i = 0; i < STRETCH; ++i) synchronize();
        continue;
      }
#pragma unroll
      for (int time = start; time < start + STRETCH; ++time) {
        const int column = first_column + time;
        const bool inside = active && column >= 0 && column < width;
        // Without chunks no pixel is outside the image; the first pixel reads zeros.
        const bool reads = active && (CHUNKED || (column >= -kRight && column < width));
        Accumulator* pixel = reads ? band.solved_at(row, time) : band.solved_at(0, 0);
        Accumulator given[kVectors * kVector], late = 0;
        load_vectors<kVector>(given, band.given_at(chunk, min(row, ROWS - 1), time));
#pragma unroll
        for (int a = KERNEL_H - 1; a > 1; --a) add(pixel, a, 0, sums[0]);
#pragma unroll
        for (int in = 0; in < CHANNELS; ++in) sums[0] += weights[0][kRight][in] * given[in];
        if (KERNEL_W > kRight + 1) add(pixel, 0, kRight + 1, late);
        if (KERNEL_H > 1) add(pixel, 1, 0, late);
        if (CHUNKED ? active : inside) pixel[out] = inside ? sums[0] + late : 0;
#pragma unroll
        for (int b = 0; b < KERNEL_W; ++b) sums[b] = b + 1 < KERNEL_W ? sums[b + 1] : 0;
        synchronize();
      }
    }
  });
}
