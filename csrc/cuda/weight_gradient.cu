// dW[o, i, a, b] = sum_{n, r, s} g[n, o, r, s] x[n, i, r - a, s - b], without patches and bitwise reproducible.
//
// A matrix product of g and the shifted x, summed over the pixels of the batch. A block of weight_gradient_parts sums
// one chunk of the pixels for a tile of outputs, inputs and taps; weight_gradient adds up the chunks. Both add in a
// fixed order, without atomics, and the many short sums keep rounding errors small.
//
// Tiles of x and g are copied to shared memory while the previous ones are summed. A thread keeps the sums of OUTPUTS x
// INPUTS channels and TAPS_H x TAPS_W taps in registers and takes four pixels of a row at a time: for a 3 x 3 kernel
// and 8 outputs, 288 multiply-adds for 14 loads of four values each. With few channels, SPLITS threads share the pixels
// of one such register tile and add up at the end of the block.
//
// Lower bounds on an H100, computed, not measured: B C C/G H W kh kw multiply-adds (at 30 T/s: 0.3 us for (100, 12, 16,
// 16) in four groups, 503 us for (100, 256, 16, 16) in one) and reading x and g. Beyond some 16 channels the
// multiply-adds are the bound. With few channels two launches, two memory accesses and the sums over the splits
// dominate. Predicted by a model of an H100 for batch 100, four groups and 3 x 3, in a graph: 6.8, 6.5 and 5.8 us for
// (12, 16, 16), (24, 8, 8) and (48, 4, 4), 9.8, 9.0 and 7.3 us for (12, 32, 32), (24, 16, 16) and (48, 8, 8), and for
// 64 to 512 channels at 16 x 16 between 58 and 70 % of the peak of multiply-adds.
//
// parameters[0] is the number of chunks. The scratch holds the sums [chunk][group][o][a][b][i]. Constants from the
// host: OUTPUTS, INPUTS, TAPS_H, TAPS_W, OUTPUT_SLOTS, INPUT_SLOTS, SPLITS, IMAGES, ROWS, COLUMNS, ROW_TILES,
// COLUMN_TILES, WIDTH_REMAINDER, ROUND_OUTPUTS, PARTS, REDUCTION_THREADS; in shared memory, values of a row of x, of a
// channel of x and of g, and of a tile: PITCH, INPUT_PITCH, OUTPUT_PITCH, STAGE.
#include "tile.cuh"

constexpr int kPixels = 4;                          // of a row that a thread takes at a time
constexpr int kVector = 16 / sizeof(Accumulator);   // values per load
constexpr int kTerms = INPUTS * TAPS_H * TAPS_W;    // sums of a thread for each of its outputs
constexpr int kUnits = OUTPUT_SLOTS * INPUT_SLOTS;  // threads with different sums
constexpr int kThreads = kUnits * SPLITS;
// Least blocks per multiprocessor, so one adds while another waits: 128 registers per thread for float32.
constexpr int kLanes = ceil_div(kThreads, 32) * 32;  // registers are allocated to whole warps
constexpr int kResidentBlocks = clamp((sizeof(Accumulator) == 4 ? 512 : 256) / kLanes, 1, 8);
constexpr int kTileOutputs = OUTPUTS * OUTPUT_SLOTS, kTileInputs = INPUTS * INPUT_SLOTS;

constexpr int kHalo = PITCH - COLUMNS, kTileRows = ROWS + TAPS_H - 1;

constexpr int kOutputTiles = ceil_div(CHANNELS, kTileOutputs), kInputTiles = ceil_div(CHANNELS, kTileInputs);
constexpr int kTapRows = ceil_div(KERNEL_H, TAPS_H), kTapColumns = ceil_div(KERNEL_W, TAPS_W);

using Sums = Accumulator[OUTPUTS][INPUTS][TAPS_H][TAPS_W];

// The first of a block.
struct Place {
  int tap_column, tap_row, input, output;
};

// Adds the first PIXELS of the kPixels neighbouring pixels of a row. `x` is kHalo columns left of where the first tap
// reads, `g` the first pixel.
template <int PIXELS>
__device__ inline void add_pixels(Sums& sums, const Accumulator* x, const Accumulator* g) {
  Accumulator gradient[OUTPUTS][kPixels];
#pragma unroll
  for (int o = 0; o < OUTPUTS; ++o) load_vectors<kVector>(gradient[o], g + o * OUTPUT_SLOTS * OUTPUT_PITCH);
#pragma unroll
  for (int i = 0; i < INPUTS; ++i) {
#pragma unroll
    for (int a = 0; a < TAPS_H; ++a) {
      Accumulator window[kHalo + kPixels];
      load_vectors<kVector>(window, x + i * INPUT_SLOTS * INPUT_PITCH - a * PITCH);
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) {
#pragma unroll
        for (int b = 0; b < TAPS_W; ++b) {
#pragma unroll
          for (int o = 0; o < OUTPUTS; ++o) sums[o][i][a][b] += gradient[o][p] * window[kHalo + p - b];
        }
      }
    }
  }
}

// Adds one tile. `x` and `g` are the thread's first channels; `rows` and `columns` remain in the image.
__device__ inline void add_tile(Sums& sums, const Accumulator* x, const Accumulator* g, int split, int rows,
                                int columns) {
  constexpr int kLines = IMAGES * ROWS, kColumns = COLUMNS / kPixels, kSegments = kLines * kColumns;
#pragma unroll 1
  for (int segment = split; segment < kSegments; segment += SPLITS) {
    // Those of fewer than kPixels come last, so that the threads of a warp add equally many.
    const int column = (WIDTH_REMAINDER ? segment / kLines : segment % kColumns) * kPixels;
    const int line = WIDTH_REMAINDER ? segment % kLines : segment / kColumns;
    const int image = line / ROWS, row = line % ROWS;
    // Skips pixels outside the image instead of multiplying by zero, because x may be infinite.
    if (row >= rows || column >= columns) continue;
    const Accumulator* const last_row = x + (image * kTileRows + row + TAPS_H - 1) * PITCH + column;
    const Accumulator* const gradient = g + line * COLUMNS + column;
    if (WIDTH_REMAINDER == 0 || column + kPixels <= columns) {
      add_pixels<kPixels>(sums, last_row, gradient);
    } else {
      // Code of its own: a branch at each pixel takes registers, and spills.
      add_pixels<WIDTH_REMAINDER>(sums, last_row, gradient);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kResidentBlocks)
    weight_gradient_parts(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* const shared = reinterpret_cast<Accumulator*>(shared_memory);

  constexpr int kBlocks = kTapColumns * kTapRows * kInputTiles * kOutputTiles;  // of one group and chunk
  const int block = blockIdx.x % kBlocks, group = blockIdx.x / kBlocks % arguments.groups;
  const int chunk = blockIdx.x / kBlocks / arguments.groups, chunks = arguments.parameters[0];
  const Place place{block % kTapColumns * TAPS_W, block / kTapColumns % kTapRows * TAPS_H,
                    block / (kTapColumns * kTapRows) % kInputTiles * kTileInputs,
                    block / (kTapColumns * kTapRows * kInputTiles) * kTileOutputs};
  const auto x = image_view(static_cast<const SCALAR*>(arguments.first), arguments.first_strides, arguments, 0, group);
  const auto g =
      image_view(static_cast<const SCALAR*>(arguments.second), arguments.second_strides, arguments, 0, group);

  const int unit = SPLITS == 1 ? threadIdx.x : threadIdx.x % kUnits, split = SPLITS == 1 ? 0 : threadIdx.x / kUnits;
  const int input_slot = unit % INPUT_SLOTS, output_slot = unit / INPUT_SLOTS;

  const long long tiles = (long long)ceil_div(arguments.batch, IMAGES) * ROW_TILES * COLUMN_TILES;
  const int first_tile = tiles * chunk / chunks, last_tile = tiles * (chunk + 1) / chunks;
  const auto copy_stage = [&](int tile) {
    const int column = tile % COLUMN_TILES * COLUMNS, row = tile / COLUMN_TILES % ROW_TILES * ROWS;
    const int image = tile / (COLUMN_TILES * ROW_TILES) * IMAGES;
    Accumulator* const target = shared + (tile - first_tile) % 2 * STAGE;
    const unsigned thread = not_hoisted(threadIdx.x);  // registers are for the sums
    copy_tile<kThreads, kTileInputs, IMAGES, kTileRows, COLUMNS + TAPS_W - 1, PITCH, INPUT_PITCH>(
        target + kHalo - (TAPS_W - 1), x, arguments.first_strides[0], arguments, place.input, image,
        row - place.tap_row - (TAPS_H - 1), column - place.tap_column - (TAPS_W - 1), thread);
    copy_tile<kThreads, kTileOutputs, IMAGES, ROWS, COLUMNS, COLUMNS, OUTPUT_PITCH>(
        target + kTileInputs * INPUT_PITCH, g, arguments.second_strides[0], arguments, place.output, image, row, column,
        thread);
  };

  Sums sums = {};
  copy_stage(first_tile);
#pragma unroll 1
  for (int tile = first_tile; tile < last_tile; ++tile) {
    wait_for_copies();
    __syncthreads();
    if (tile + 1 < last_tile) copy_stage(tile + 1);
    const Accumulator* const current = shared + (tile - first_tile) % 2 * STAGE;
    add_tile(sums, current + input_slot * INPUT_PITCH, current + kTileInputs * INPUT_PITCH + output_slot * OUTPUT_PITCH,
             split, arguments.height - tile / COLUMN_TILES % ROW_TILES * ROWS,
             arguments.width - tile % COLUMN_TILES * COLUMNS);
  }

  // The place of the sums, chunk * groups + group, not kept from the start: registers were for the sums.
  const long long part = not_hoisted(blockIdx.x) / kBlocks;
  Accumulator* const parts = reinterpret_cast<Accumulator*>(arguments.scratch);
  const auto store_part = [&](int o, int term, Accumulator sum) {
    const int b = place.tap_column + term % TAPS_W, a = place.tap_row + term / TAPS_W % TAPS_H;
    const int input = place.input + input_slot + term / (TAPS_W * TAPS_H) * INPUT_SLOTS;
    const int output = place.output + output_slot + o * OUTPUT_SLOTS;
    if (b < KERNEL_W && a < KERNEL_H && input < CHANNELS && output < CHANNELS) {
      const long long row = part * CHANNELS + output;
      parts[((row * KERNEL_H + a) * KERNEL_W + b) * CHANNELS + input] = sum;
    }
  };
#pragma unroll
  for (int first_output = 0; first_output < OUTPUTS; first_output += ROUND_OUTPUTS) {
    constexpr int kTaps = TAPS_H * TAPS_W;
    if constexpr (SPLITS > 1) __syncthreads();
#pragma unroll
    for (int o = first_output; o < first_output + ROUND_OUTPUTS && o < OUTPUTS; ++o) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const Accumulator sum = sums[o][term / kTaps][term / TAPS_W % TAPS_H][term % TAPS_W];
        if constexpr (SPLITS == 1) {
          store_part(o, term, sum);
        } else {
          shared[((o - first_output) * kTerms + term) * kThreads + threadIdx.x] = sum;
        }
      }
    }
    if constexpr (SPLITS > 1) {
      __syncthreads();
      const int outputs = OUTPUTS - first_output < ROUND_OUTPUTS ? OUTPUTS - first_output : ROUND_OUTPUTS;
      for (int index = split; index < outputs * kTerms; index += SPLITS) {
        Accumulator sum = 0;
#pragma unroll 8
        for (int s = 0; s < SPLITS; ++s) sum += shared[index * kThreads + s * kUnits + unit];
        store_part(first_output + index / kTerms, index % kTerms, sum);
      }
    }
  }
}

// Adds the chunks of one entry per thread or, with many chunks, per PARTS threads, which share them.
extern "C" __global__ void __launch_bounds__(REDUCTION_THREADS)
    weight_gradient(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* const shared = reinterpret_cast<Accumulator*>(shared_memory);

  constexpr int kEntries = REDUCTION_THREADS / PARTS;
  const int part = threadIdx.x / kEntries;
  long long entry = (long long)blockIdx.x * kEntries + threadIdx.x % kEntries;
  const int input = entry % CHANNELS;
  entry /= CHANNELS;
  const int b = entry % arguments.kernel_w;
  entry /= arguments.kernel_w;
  const int a = entry % arguments.kernel_h;
  entry /= arguments.kernel_h;
  const int output = entry % CHANNELS, group = entry / CHANNELS;

  const bool masked = input + arguments.unit_diagonal > output && a == 0 && b == 0;
  const bool present = group < arguments.groups && a < KERNEL_H && b < KERNEL_W && !masked;
  Accumulator sum = 0;
  if (present) {
    constexpr long long kGroup = (long long)CHANNELS * KERNEL_H * KERNEL_W * CHANNELS;
    const Accumulator* const first = reinterpret_cast<const Accumulator*>(arguments.scratch) + group * kGroup +
                                     (((long long)output * KERNEL_H + a) * KERNEL_W + b) * CHANNELS + input;
#pragma unroll 8
    for (int chunk = part; chunk < arguments.parameters[0]; chunk += PARTS) {
      sum += first[(long long)chunk * arguments.groups * kGroup];
    }
  }
  if constexpr (PARTS > 1) {
    shared[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) sum += shared[p * kEntries + threadIdx.x % kEntries];
  }
  if (part == 0 && group < arguments.groups) {
    const auto gradient =
        weight_view(static_cast<SCALAR*>(arguments.output), arguments.output_strides, arguments, group);
    store(gradient.data + output * gradient.out + input * gradient.in + a * gradient.row + b * gradient.column, sum);
  }
}
