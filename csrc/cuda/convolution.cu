// y = A x + bias or, with TRANSPOSE, y = A^T x + bias, for all groups and images in one launch, without padding or
// copies.
//
// A block computes TILE_OUTPUTS channels of IMAGES x ROWS x COLUMNS pixels of one group. It goes through the input
// channels CHUNK at a time and through the kernel TAPS_H x TAPS_W taps at a time, and copies each such stage to shared
// memory while it computes the previous one. A thread computes OUTPUTS channels of PIXELS pixels in a column, so a
// value of x serves several taps and a weight serves several pixels. The lanes of a warp go along the row, for
// consecutive addresses in shared and global memory. If pixels and channels do not fill the device, SPLITS threads
// share the input channels of one such register tile and add up at the end, in a fixed order.
//
// Lower bounds on an H100, computed, not measured: 2 B C H W sizeof(SCALAR) bytes (at 2.5 TB/s: 1 us for (100, 12, 16,
// 16) in float32) and B C C/G H W kh kw multiply-adds (at 30 T/s: 0.3 us there; 4.4 us for (100, 48, 8, 8) in one
// group). Loads from shared memory are the bound beyond one per four multiply-adds: with 8 channels and 4 pixels per
// thread there are 6 + 6 loads for 96 of them at KERNEL_H = 3. At small sizes the launch, one memory access and the
// barrier after it dominate; a model predicts 3.8 us for (100, 12, 16, 16).
//
// Constants from the host: OUTPUTS, PIXELS, TILE_OUTPUTS, SPLITS, IMAGES, ROWS, COLUMNS, ROW_TILES, COLUMN_TILES,
// PITCH, CHUNK, TAPS_H, TAPS_W; BIAS, 1 if there is one; VECTOR, values of a load of weights; TAP_WEIGHTS and STAGE,
// values of a tap's weights and of a stage in shared memory.
#include "tile.cuh"

constexpr int kRowSlots = ROWS / PIXELS, kOutputSlots = TILE_OUTPUTS / OUTPUTS;
constexpr int kTiles = IMAGES * kRowSlots * COLUMNS * kOutputSlots;  // register tiles of a block
constexpr int kThreads = kTiles * SPLITS;
// Least blocks per multiprocessor, so one adds while another waits: 128 registers per thread for float32.
constexpr int kLanes = ceil_div(kThreads, 32) * 32;  // registers are allocated to whole warps
constexpr int kResidentBlocks = clamp((sizeof(Accumulator) == 4 ? 512 : 256) / kLanes, 1, 8);

constexpr int kTileRows = ROWS + TAPS_H - 1, kPlane = IMAGES * kTileRows * PITCH;
// A thread's weights for one tap are contiguous, in whole vectors.
constexpr int kSlotWeights = ceil_div(OUTPUTS, VECTOR) * VECTOR;
constexpr int kWeights = CHUNK * TAPS_H * TAPS_W * TAP_WEIGHTS;

constexpr int kTapRows = ceil_div(KERNEL_H, TAPS_H), kTapColumns = ceil_div(KERNEL_W, TAPS_W);
constexpr int kStages = ceil_div(CHANNELS, CHUNK) * kTapRows * kTapColumns;

// Unrolled just enough to hide the latency of shared memory, because run-time compilation must stay fast.
constexpr int kUnrolledProducts = 512;
constexpr int kUnrolledColumns = clamp(kUnrolledProducts / (OUTPUTS * PIXELS * TAPS_H), 1, TAPS_W);
constexpr int kUnrolledChannels = clamp(kUnrolledProducts / (OUTPUTS * PIXELS * TAPS_H * TAPS_W), 1, 4);

struct Place {
  int output, image, row, column;  // first of the block
};

__device__ inline Place place_of(int block) {
  constexpr int kOutputTiles = ceil_div(CHANNELS, TILE_OUTPUTS);
  return {block % kOutputTiles * TILE_OUTPUTS, block / (kOutputTiles * COLUMN_TILES * ROW_TILES) * IMAGES,
          block / (kOutputTiles * COLUMN_TILES) % ROW_TILES * ROWS, block / kOutputTiles % COLUMN_TILES * COLUMNS};
}

struct Stage {
  int channel, tap_row, tap_column;  // first of the stage
};

__device__ inline Stage stage_of(int index) {
  return {index / (kTapRows * kTapColumns) * CHUNK, index / kTapColumns % kTapRows * TAPS_H,
          index % kTapColumns * TAPS_W};
}

// A thread keeps its tap and walks the output channels, to compute one address per tap. Neighbouring threads take
// neighbouring taps, in the order of memory.
__device__ inline void copy_weights(Accumulator* weights, const WeightView<const SCALAR>& view,
                                    const Arguments& arguments, int group, int output, const Stage& stage) {
  constexpr int kTaps = CHUNK * TAPS_H * TAPS_W;
  constexpr int kOutputsAtOnce = kTaps < kThreads ? kThreads / kTaps : 1;
  const int first = threadIdx.x / kTaps;
  if (first >= kOutputsAtOnce) return;
  for (int tap = threadIdx.x % kTaps; tap < kTaps; tap += kThreads) {
    const int b = tap % TAPS_W, a = tap / TAPS_W % TAPS_H, c = tap / (TAPS_W * TAPS_H);
    const int column = stage.tap_column + b, row = stage.tap_row + a, input = stage.channel + c;
    const bool present = column < KERNEL_W && row < KERNEL_H && input < CHANNELS && (row > 0 || column >= kRight);
    const bool pivot = column == kRight && row == 0, own = has_own_diagonal(arguments);
    const int least_output = pivot ? input + !own : 0;  // the mask
    const SCALAR* source =
        view.data + (output + first) * view.out + input * view.in + row * view.row + column * view.column;
    Accumulator* const target = weights + ((c * TAPS_W + b) * TAPS_H + a) * TAP_WEIGHTS;
#pragma unroll 4
    for (int o = first; o < TILE_OUTPUTS; o += kOutputsAtOnce) {
      Accumulator* const weight = target + o / OUTPUTS * kSlotWeights + o % OUTPUTS;
      if (present && output + o >= least_output && output + o < CHANNELS) {
        copy_to_shared(weight, source);
      } else {
        *weight = 0;
      }
      source += kOutputsAtOnce * view.out;
    }
    const int o = input - output;
    if (pivot && !own && present && o >= 0 && o < TILE_OUTPUTS && o % kOutputsAtOnce == first) {
      target[o / OUTPUTS * kSlotWeights + o % OUTPUTS] = diagonal_of(arguments, group, input);
    }
  }
}

// Adds the products of COUNT taps of one input channel and column; the first tap reads the rows starting at x.
template <int COUNT>
__device__ inline void add_products(Accumulator (&sums)[OUTPUTS][PIXELS], const Accumulator* x,
                                    const Accumulator* weights) {
  Accumulator window[PIXELS + COUNT - 1];
#pragma unroll
  for (int r = 0; r < PIXELS + COUNT - 1; ++r) window[r] = x[(r - (COUNT - 1)) * PITCH];
#pragma unroll
  for (int a = 0; a < COUNT; ++a) {
    Accumulator weight[kSlotWeights];
    load_vectors<VECTOR>(weight, weights + a * TAP_WEIGHTS);
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) sums[o][p] += weight[o] * window[p + COUNT - 1 - a];
    }
  }
}

// Adds the products of one stage. `x` is the thread's first pixel in the tile; `weights` is its first output.
__device__ inline void add_stage(Accumulator (&sums)[OUTPUTS][PIXELS], const Accumulator* x, const Accumulator* weights,
                                 int split, const Stage& stage) {
  // Skips taps beyond the kernel instead of multiplying by zero, because x may be infinite.
  const int tap_rows = KERNEL_H % TAPS_H ? min(TAPS_H, KERNEL_H - stage.tap_row) : TAPS_H;
  const int tap_columns = KERNEL_W % TAPS_W ? min(TAPS_W, KERNEL_W - stage.tap_column) : TAPS_W;
  // From an unknown start: for a few channels the compiler would unroll all rounds and load their weights ahead.
#pragma unroll kUnrolledChannels
  for (int first = not_hoisted(0); first < CHUNK; first += SPLITS) {
    const int c = first + split;
    if (CHUNK % SPLITS && c >= CHUNK) break;
#pragma unroll kUnrolledColumns
    for (int b = 0; b < tap_columns; ++b) {
      const Accumulator* column = x + c * kPlane - b;
      const Accumulator* column_weights = weights + (c * TAPS_W + b) * TAPS_H * TAP_WEIGHTS;
      if (tap_rows == TAPS_H) {
        add_products<TAPS_H>(sums, column, column_weights);
      } else {
        for (int a = 0; a < tap_rows; ++a) {
          add_products<1>(sums, column - a * PITCH, column_weights + a * TAP_WEIGHTS);
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kResidentBlocks)
    convolution(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* const shared = reinterpret_cast<Accumulator*>(shared_memory);

  const int group = blockIdx.x % arguments.groups;
  const Place place = place_of(blockIdx.x / arguments.groups);
  const auto x = image_view(static_cast<const SCALAR*>(arguments.first), arguments.first_strides, arguments, 0, group);
  const auto weight =
      weight_view(static_cast<const SCALAR*>(arguments.second), arguments.second_strides, arguments, group);

  const int tile = threadIdx.x % kTiles, split = SPLITS == 1 ? 0 : threadIdx.x / kTiles;
  const int column = tile % COLUMNS, row = tile / COLUMNS % kRowSlots * PIXELS;
  const int image = tile / (COLUMNS * kRowSlots) % IMAGES, output_slot = tile / (COLUMNS * kRowSlots * IMAGES);

  const auto copy_stage = [&](int index) {
    const Stage stage = stage_of(index);
    Accumulator* const target = shared + index % 2 * STAGE;
    copy_weights(target, weight, arguments, group, place.output, stage);
    copy_tile<kThreads, CHUNK, IMAGES, kTileRows, COLUMNS + TAPS_W - 1, PITCH, kPlane>(
        target + kWeights, x, arguments.first_strides[0], arguments, stage.channel, place.image,
        place.row - stage.tap_row - (TAPS_H - 1), place.column + kRight - stage.tap_column - (TAPS_W - 1), threadIdx.x);
  };

  Accumulator sums[OUTPUTS][PIXELS] = {};
  copy_stage(0);
#pragma unroll 1
  for (int index = 0; index < kStages; ++index) {
    wait_for_copies();
    __syncthreads();
    if (index + 1 < kStages) copy_stage(index + 1);
    const Accumulator* const current = shared + index % 2 * STAGE;
    add_stage(sums, current + kWeights + (image * kTileRows + row + TAPS_H - 1) * PITCH + column + TAPS_W - 1,
              current + output_slot * kSlotWeights, split, stage_of(index));
  }

  const auto y = image_view(static_cast<SCALAR*>(arguments.output), arguments.output_strides, arguments, 0, group);
  const auto store_sum = [&](int o, int p, Accumulator sum) {
    const int c = place.output + output_slot * OUTPUTS + o, r = place.row + row + p;
    const int s = place.column + column, n = place.image + image;
    if (c < CHANNELS && n < arguments.batch && r < arguments.height && s < arguments.width) {
      store(y.data + n * arguments.output_strides[0] + c * y.channel + r * y.row + s * y.column, sum);
    }
  };
  const auto add_bias = [&](int o, Accumulator sum) {
    const int c = place.output + output_slot * OUTPUTS + o;
    return c < CHANNELS ? sum + bias_of(arguments, group, c) : sum;
  };
  if constexpr (SPLITS == 1) {
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) store_sum(o, p, BIAS ? add_bias(o, sums[o][p]) : sums[o][p]);
    }
  } else {
    __syncthreads();
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) shared[(o * PIXELS + p) * kThreads + threadIdx.x] = sums[o][p];
    }
    __syncthreads();
    for (int index = split; index < OUTPUTS * PIXELS; index += SPLITS) {
      Accumulator sum = 0;
#pragma unroll
      for (int s = 0; s < SPLITS; ++s) sum += shared[index * kThreads + s * kTiles + tile];
      store_sum(index / PIXELS, index % PIXELS, BIAS ? add_bias(index / PIXELS, sum) : sum);
    }
  }
}
