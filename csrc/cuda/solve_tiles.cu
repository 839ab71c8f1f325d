// x = A^-1 (y - bias) for many channels: a diagonal of all images is one matrix product, a thread block a tile of it.
//
// With P the pivot and V(a, b) = P^-1 W(a, b), which `premultiply` has computed, and y - bias as `arrange` lays it out,
//
//     x[r, s] = P^-1 y[r, s] - sum_{(a, b) != (0, 0)} V(a, b) x[r - a, s - b]
//
// A block computes OUTPUTS channels of PIXELS pixels with equal r + s, or of half as many on short diagonals. It adds y
// first, then the lags (a, b) by falling a + b. All but the last lags were solved long before, so blocks of several
// diagonals run at once, and only the lags with a + b = 1 form a chain. A block publishes its tile by a flag, and waits
// for the flags of the tiles that its images have in the diagonal that it reads next. It takes its work by ticket, in
// the order of the diagonals, so it waits only for blocks that already run.
//
// A stage is OUTPUTS input channels, copied to shared memory while the previous stage is added; kSplits threads share
// the vectors of a register tile of kEach x kEach and add their sums at the end, in a fixed order.
//
// Multiply-adds bound it, at 82 % of the peak while three blocks of a multiprocessor compute. Where a diagonal has few
// tiles, a step of the chain does: 7 thousand cycles with half a tile, 10 with a whole one. Predicted by a model of an
// H100 for batch 100 at 16 x 16, premultiply included: one group of 128, 256 and 512 channels 0.28, 0.77 and 2.7 ms,
// four groups of 128 0.74. By the same model it was 0.39, 0.95, 3.1 and 0.84 with whole tiles only and borders read by
// tests; matrix products of cuBLAS take 0.55, 1.35, 4.1 and 1.4, estimated by hand.
//
// More constants than those of arguments.cuh:
//   GROUPS, BIAS   as band.cuh documents them
//   THREADS, BLOCKS   in a block; blocks that a multiprocessor should hold at once. PIXELS, OUTPUTS: see above
//   PADDED         CHANNELS rounded up to a multiple of OUTPUTS; what is beyond is zero
//   PITCH, STAGE   values of a row in shared memory, and of a stage
//   TICKET_BYTES, TILE_BYTES   of shared memory, for the ticket, and before the two stages
// Arguments: parameters[0] = tiles of a diagonal at most; parameters[1] = rows of the longest short diagonal;
// offsets[0] = the ticket, then a flag [group][diagonal][tile][slice] each; offsets[1] = what premultiply wrote;
// offsets[2] and offsets[3] = y - bias and x, [group][image][row][column][PADDED], with KERNEL_H - 1 rows above and
// KERNEL_W - 1 columns to the left, zeros in x.
#include "arguments.cuh"

static_assert(sizeof(Accumulator) == 4, "vectors of four");
constexpr int kEach = 8;
constexpr int kVectors = PADDED / 4, kDepth = OUTPUTS / 4;  // of a pixel and of a stage
constexpr int kReads = KERNEL_H * KERNEL_W * kVectors, kSlices = PADDED / OUTPUTS;
constexpr int kOutputSlots = OUTPUTS / kEach, kPixelSlots = PIXELS / kEach, kSlots = kOutputSlots * kPixelSlots;
constexpr int kSplits = THREADS / kSlots, kCopied = THREADS / kDepth;  // the latter rows of a stage at once
constexpr int kHaloRows = KERNEL_H - 1, kHaloColumns = KERNEL_W - 1;   // zeros around an image
using Quad = Vector<4>;

struct Lag {
  int a, b;
  __device__ int age() const { return a + b; }
  // The order of the sum: (0, 0), which stands for y, then by falling age, from the oldest within the image.
  __device__ Lag next(int diagonal) const {
    if (a > 0 && b + 1 < KERNEL_W) return {a - 1, b + 1};
    const int next_age = min(diagonal, age() ? age() - 1 : KERNEL_H + KERNEL_W - 2), row = min(KERNEL_H - 1, next_age);
    return {row, next_age - row};
  }
};

struct Diagonal {
  int first_row, rows;
  int pixels;  // of a tile
  __device__ Diagonal(const Arguments& arguments, int index)
      : first_row(max(0, index - arguments.width + 1)),
        rows(min(arguments.height - 1, index) - first_row + 1),
        pixels(rows > arguments.parameters[1] ? PIXELS : PIXELS / 2) {}
};

struct Pixel {
  int image, row, column, place;  // the last in what `arrange` lays out
};
static_assert(TICKET_BYTES + PIXELS * sizeof(Pixel) <= TILE_BYTES, "see the planner");

struct Tile {
  const Arguments& arguments;
  int slice, index, group, diagonal;

  // Returns the flags of the slices of a tile.
  __device__ int* flags(int of_diagonal, int of_tile) const {
    const int diagonals = arguments.height + arguments.width - 1;
    const int before = of_tile + arguments.parameters[0] * (of_diagonal + diagonals * group);
    return reinterpret_cast<int*>(arguments.scratch + arguments.offsets[0]) + 1 + kSlices * before;
  }

  // Waits until the pixels of these images on another diagonal are solved. A barrier must follow.
  __device__ void wait_for(int of_diagonal, int first_image, int last_image) const {
    const Diagonal read(arguments, of_diagonal);
    const int first = first_image * read.rows / read.pixels,
              last = (last_image * read.rows + read.rows - 1) / read.pixels;
    for (int i = threadIdx.x; i < (last - first + 1) * kSlices; i += THREADS) {
      const int* solved = flags(of_diagonal, first) + i;
      while (!load_relaxed(solved)) {
      }
      load_acquire(solved);
    }
  }
};

// Adds a stage's products for this thread's channels of its first COUNT pixels.
template <int COUNT>
__device__ inline void add_stage(Quad (&sums)[kEach][2], const Accumulator* pixels, const Accumulator* weights) {
#pragma unroll kEach / COUNT
  for (int v = 0; v < kDepth; v += kSplits) {
    Quad values[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = *reinterpret_cast<const Quad*>(pixels + i * kPixelSlots * PITCH);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Quad factors = *reinterpret_cast<const Quad*>(weights + j * kDepth * PITCH + half * OUTPUTS / 2);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i][half].values[k] += values[i].values[j] * factors.values[k];
        }
      }
    }
    pixels += kSplits * 4;
    weights += kSplits * PITCH;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) solve_tiles(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  int* taken = reinterpret_cast<int*>(shared_memory);
  if (threadIdx.x == 0) *taken = atomicAdd(reinterpret_cast<int*>(arguments.scratch + arguments.offsets[0]), 1);
  __syncthreads();
  const int ticket = *taken, tiles = arguments.parameters[0];
  const Tile tile{arguments, ticket % kSlices, ticket / kSlices % tiles, ticket / (kSlices * tiles) % GROUPS,
                  ticket / (kSlices * tiles * GROUPS)};
  const Diagonal diagonal(arguments, tile.diagonal);
  const int first_pixel = tile.index * diagonal.pixels, beyond = arguments.batch * diagonal.rows;
  if (first_pixel >= beyond) return;
  const int last_pixel = min(beyond, first_pixel + diagonal.pixels) - 1;
  Pixel* const tile_pixels = reinterpret_cast<Pixel*>(shared_memory + TICKET_BYTES);
  Accumulator* const stages = reinterpret_cast<Accumulator*>(shared_memory + TILE_BYTES);
  const int width = arguments.width + kHaloColumns;
  if (threadIdx.x < PIXELS) {
    const int pixel = min(last_pixel, first_pixel + int(threadIdx.x));  // those beyond the last are not written
    const int row = diagonal.first_row + pixel % diagonal.rows, column = tile.diagonal - row;
    const int image = pixel / diagonal.rows, problem = tile.group * arguments.batch + image;
    const int line = problem * (arguments.height + kHaloRows) + kHaloRows + row;
    tile_pixels[threadIdx.x] = {image, row, column, line * width + kHaloColumns + column};
  }
  __syncthreads();
  const auto region = [&](int i) { return reinterpret_cast<Quad*>(arguments.scratch + arguments.offsets[i]); };
  Quad* const solved = region(3);
  const int vector = threadIdx.x % kDepth, first_copied = threadIdx.x / kDepth;
  Accumulator* const copy_pixels_to = kept(stages + first_copied * PITCH + vector * 4);
  Accumulator* const copy_weights_to = kept(stages + (PIXELS + vector) * PITCH + first_copied * 4);
  const Quad* const premultiplied =
      region(1) + (long long)(tile.group * PADDED + tile.slice * kDepth + first_copied) * kReads + vector;
  int places[PIXELS / kCopied];
#pragma unroll
  for (int i = 0; i < PIXELS / kCopied; ++i) places[i] = tile_pixels[first_copied + i * kCopied].place;
  const bool narrow = diagonal.pixels < PIXELS;
  Lag lag{0, 0};
  const Quad *pixels_from = region(2) + vector, *weights_from = premultiplied;
  int left = tile.slice + 1;  // stages of the lag; P^-1 has nothing beyond its diagonal
  bool more = true;
  const auto fetch = [&](int stage) {
    Accumulator* to = copy_pixels_to + (stage & 1) * STAGE;
#pragma unroll
    for (int i = 0; i < PIXELS / kCopied; ++i) {
      if (narrow && i >= PIXELS / 2 / kCopied) break;
      copy_async(reinterpret_cast<Quad*>(to + i * kCopied * PITCH), pixels_from + (long long)places[i] * kVectors);
    }
    to = copy_weights_to + (stage & 1) * STAGE;
#pragma unroll
    for (int i = 0; i < OUTPUTS / kCopied; ++i) {
      const int row = i * kCopied, input = row / kDepth, outputs = row % kDepth;
      copy_async(reinterpret_cast<Quad*>(to + input * kDepth * PITCH + outputs * 4),
                 weights_from + (input * kVectors + outputs) * kReads);
    }
    pixels_from += kDepth;
    weights_from += kDepth;
    if (--left == 0) {
      lag = lag.next(tile.diagonal);
      left = kSlices;
      more = lag.age() > 0;
      pixels_from = solved + vector - (long long)(lag.a * width + lag.b) * kVectors;
      weights_from = premultiplied + (lag.a * KERNEL_W + lag.b) * kVectors;
    }
  };

  const int slot = threadIdx.x % kSlots, split = threadIdx.x / kSlots;
  const int output_slot = slot % kOutputSlots, pixel_slot = slot / kOutputSlots;
  const Accumulator* const first_pixels = kept(stages + pixel_slot * PITCH + split * 4);
  const Accumulator* const first_weights = kept(stages + (PIXELS + split) * PITCH + output_slot * 4);
  Quad sums[kEach][2] = {};
  // What has come is added up before anything is waited for, which is then fetched without work to hide it.
  for (int fetched = 0, added = 0, age = 0; more || added < fetched;) {
    wait_for_copies();
    __syncthreads();
    const bool there = added < fetched;
    if (more && lag.age() == age) fetch(fetched++);
    if (there) {
      const int from = (added++ & 1) * STAGE;
      if (narrow) add_stage<kEach / 2>(sums, first_pixels + from, first_weights + from);
      if (!narrow) add_stage<kEach>(sums, first_pixels + from, first_weights + from);
    }
    if (more && added == fetched) {
      age = lag.age();
      tile.wait_for(tile.diagonal - age, first_pixel / diagonal.rows, last_pixel / diagonal.rows);
    }
  }
  // Each split adds up some pixels of the register tile.
  __syncthreads();
  Quad* const parts = reinterpret_cast<Quad*>(stages) + slot;
#pragma unroll
  for (int i = 0; i < 2 * kEach; ++i) parts[(split * 2 * kEach + i) * kSlots] = sums[i / 2][i % 2];
  __syncthreads();
  constexpr int kOwn = 2 * kEach / kSplits;
  Quad totals[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int from = 0; from < kSplits; ++from) {
      const Quad part = parts[(from * 2 * kEach + split * kOwn + i) * kSlots];
#pragma unroll
      for (int k = 0; k < 4; ++k) totals[i].values[k] += part.values[k];
    }
  }
  const auto pixel_of = [&](int i) { return (split * kOwn + i) / 2 * kPixelSlots + pixel_slot; };
  const auto output_of = [&](int i) { return tile.slice * OUTPUTS + i % 2 * (OUTPUTS / 2) + output_slot * 4; };
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const long long place = tile_pixels[pixel_of(i)].place;
    if (first_pixel + pixel_of(i) <= last_pixel) solved[place * kVectors + output_of(i) / 4] = totals[i];
  }
  __syncthreads();
  if (threadIdx.x < 32) store_release(tile.flags(tile.diagonal, tile.index) + tile.slice, 1);  // a whole warp
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const Pixel pixel = tile_pixels[pixel_of(i)];
    const auto view = image_view(static_cast<SCALAR*>(arguments.output), arguments.output_strides, arguments,
                                 pixel.image, tile.group);
    SCALAR* to = view.data + pixel.row * view.row + pixel.column * view.column + output_of(i) * view.channel;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = first_pixel + pixel_of(i) <= last_pixel && output_of(i) + k < CHANNELS;
      if (inside) store(to + k * view.channel, totals[i].values[k]);
    }
  }
}

// A thread writes four channels of a pixel; eight neighbouring threads take neighbouring pixels.
extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ Arguments arguments) {
  const long long thread = (long long)blockIdx.x * THREADS + threadIdx.x;
  const long long place = thread / (8 * kVectors) * 8 + thread % 8;
  const int channel = thread / 8 % kVectors * 4, width = arguments.width + kHaloColumns;
  const int size = (arguments.height + kHaloRows) * width;
  const int problem = place / size, row = place % size / width - kHaloRows, column = place % width - kHaloColumns;
  const bool outside = row < 0 || column < 0;
  if (problem >= arguments.batch * GROUPS) return;
  const int group = problem / arguments.batch, image = problem % arguments.batch;
  const auto view =
      image_view(static_cast<const SCALAR*>(arguments.first), arguments.first_strides, arguments, image, group);
  Quad values = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!outside && channel + k < CHANNELS) {
      values.values[k] = load(view.data + (channel + k) * view.channel + row * view.row + column * view.column) -
                         (BIAS ? bias_of(arguments, group, channel + k) : 0);
    }
  }
  const long long region = outside ? arguments.offsets[3] : arguments.offsets[2];
  reinterpret_cast<Quad*>(arguments.scratch + region)[(place * PADDED + channel) / 4] = values;
}
