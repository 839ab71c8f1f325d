// Matrix products of weights and pixels, for many channels: the convolution, and the two halves of a step of the
// blocked solver. Images are canonical (layout.cu), weights packed (prepare.cu); channels are padded, and need no
// bounds.
//
// The blocked solver cuts the image into tiles of t x t pixels, and solves the tiles of one anti-diagonal of
// tiles after another. What is known comes off first, then the inverse of the operator inside a tile, which is a causal
// convolution with the impulse response G, is a product as well:
//
//   part 0, outside   rhs[p] -= sum over lags that leave the tile     W(lag) x[p - lag]
//   part 1, inside    x[p]    = sum over lags that stay in the tile   G(lag) rhs[p - lag]
//   part 2, all       y[p]    = sum over all lags                     W(lag) x[p - lag]      the convolution
//
// layout.cu adds the bias, or takes it off.
//
// For 3 x 3 kernels and t = 4 these are 3.9 + 6.25 products a pixel, against the convolution's 9, in
// 2 (H/4 + W/4 - 1) launches, each of which has 16 pixels of every tile on the diagonal and all images to do at once.
//
// A block computes BLOCK_M output channels of one pixel of the tile for BLOCK_N columns; a column is an image and a
// tile (all: an image and a pixel). It walks over the lags and, 16 at a time, over the input channels, one slab of
// weights and pixels ahead in registers. A thread holds THREAD_M x 4 sums.
//
// What bounds it: the multiply-adds, batch H W C^2 kh kw / (128 lanes an SM and cycle), if blocks fill the device.
//
// Constants beside those of arguments.cuh: PADDED, BLOCK_M, BLOCK_N, THREAD_M.
// Arguments: batch = images of a group; parameters = {part, t, first row of tiles, tiles on the diagonal, the diagonal,
// and distances in the weights [...][PADDED], in units of PADDED: from a lag to the next, from an input channel to the
// next, from a group to the next}; offsets = {weights, images read, images written}.
#include "arguments.cuh"

constexpr int kOutside = 0, kInside = 1, kAll = 2;
constexpr int kSlab = 16;
constexpr int kThreadsM = BLOCK_M / THREAD_M, kThreadsN = BLOCK_N / 4, kThreads = kThreadsM * kThreadsN;
constexpr int kMBlocks = ceil_div(PADDED, BLOCK_M);
// In quads of 4 channels, the unit of all reads.
constexpr int kWeightQuads = kSlab * BLOCK_M / 4 / kThreads, kPixelQuads = kSlab * BLOCK_N / 4 / kThreads;
constexpr int kPixelPitch = BLOCK_N + 4;
constexpr int kWeightsSize = kSlab * BLOCK_M, kPixelsSize = kSlab * kPixelPitch;
static_assert(kWeightQuads * kThreads * 4 == kSlab * BLOCK_M && kPixelQuads * kThreads * 4 == kSlab * BLOCK_N, "");

using Quad = Vector<4>;

struct Column {
  const Accumulator* image;  // null beyond the last column
  int row, column;
};

extern "C" __global__ void __launch_bounds__(kThreads) products(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator* shared = reinterpret_cast<Accumulator*>(shared_memory);
  const int height = arguments.height, width = arguments.width;
  const int part = arguments.parameters[0], tile = arguments.parameters[1], tiles = arguments.parameters[3];
  const long long columns = (long long)arguments.batch * (part == kAll ? height * width : tiles);
  const long long n_blocks = (columns + BLOCK_N - 1) / BLOCK_N;

  // The last pixel of a tile has the longest sum inside, the first one outside: longest first.
  const int pixels = tile * tile;
  long long index = blockIdx.x;
  const int rank = index / (n_blocks * kMBlocks * arguments.groups);
  const int pixel = part == kInside ? pixels - 1 - rank : rank;
  index %= n_blocks * kMBlocks * arguments.groups;
  const int group = index / (n_blocks * kMBlocks);
  index %= n_blocks * kMBlocks;
  const int first_output = index / n_blocks * BLOCK_M;
  const long long first_column = index % n_blocks * BLOCK_N;
  const int tile_row = pixel / tile, tile_column = pixel % tile;

  const long long image_size = (long long)height * width * PADDED;
  const long long group_size = arguments.batch * image_size;
  const Accumulator* weights = reinterpret_cast<const Accumulator*>(arguments.scratch + arguments.offsets[0]) +
                               (long long)group * arguments.parameters[7] * PADDED;
  const Accumulator* images =
      reinterpret_cast<const Accumulator*>(arguments.scratch + arguments.offsets[1]) + group * group_size;
  Accumulator* results = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[2]) + group * group_size;

  const auto locate = [&](long long n) {
    if (n >= columns) return Column{nullptr, 0, 0};
    if (part == kAll) {
      const int at = n % (height * width);
      return Column{images + n / (height * width) * image_size, at / width, at % width};
    }
    const int row_of_tiles = arguments.parameters[2] + int(n % tiles);
    const int row = row_of_tiles * tile + tile_row;
    const int column = (arguments.parameters[4] - row_of_tiles) * tile + tile_column;
    if (row >= height || column >= width) return Column{nullptr, 0, 0};
    return Column{images + n / tiles * image_size, row, column};
  };

  // What this thread reads of a slab: some quads of weights, some of pixels.
  Column read[kPixelQuads];
#pragma unroll
  for (int i = 0; i < kPixelQuads; ++i) read[i] = locate(first_column + (threadIdx.x + i * kThreads) / (kSlab / 4));
  Quad weight_quads[kWeightQuads], pixel_quads[kPixelQuads];
  const auto fetch = [&](int a, int b, int first_input) {
    const int lag = part == kInside ? a * tile + b : a * KERNEL_W + b;
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      const int quad = threadIdx.x + i * kThreads;
      const int in = first_input + quad / (BLOCK_M / 4), out = first_output + quad % (BLOCK_M / 4) * 4;
      const long long at = (long long)lag * arguments.parameters[5] + (long long)in * arguments.parameters[6];
      weight_quads[i] =
          in < PADDED && out < PADDED ? *reinterpret_cast<const Quad*>(weights + at * PADDED + out) : Quad{};
    }
#pragma unroll
    for (int i = 0; i < kPixelQuads; ++i) {
      const int in = first_input + (threadIdx.x + i * kThreads) % (kSlab / 4) * 4;
      const int row = read[i].row - a, column = read[i].column - b;
      const bool inside = read[i].image != nullptr && row >= 0 && column >= 0 && in < PADDED;
      const Accumulator* from = read[i].image + ((long long)row * width + column) * PADDED + in;
      pixel_quads[i] = inside ? *reinterpret_cast<const Quad*>(from) : Quad{};
    }
  };
  const auto keep = [&](int buffer) {
    Accumulator* to_weights = shared + buffer * (kWeightsSize + kPixelsSize);
    Accumulator* to_pixels = to_weights + kWeightsSize;
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      reinterpret_cast<Quad*>(to_weights)[threadIdx.x + i * kThreads] = weight_quads[i];
    }
#pragma unroll
    for (int i = 0; i < kPixelQuads; ++i) {
      const int quad = threadIdx.x + i * kThreads;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to_pixels[(quad % (kSlab / 4) * 4 + j) * kPixelPitch + quad / (kSlab / 4)] = pixel_quads[i].values[j];
      }
    }
  };

  // Lags from the farthest to the pivot, and of each the slabs of input channels. The pivot's products are the largest
  // in a layer near the identity, and cost the sum least accuracy when they come last.
  int a = part == kInside ? tile_row : KERNEL_H - 1, b = (part == kInside ? tile_column : KERNEL_W - 1) + 1;
  int first_input = PADDED;
  const auto advance = [&] {
    first_input += kSlab;
    if (first_input < PADDED) return true;
    first_input = 0;
    do {
      if (--b < 0) {
        b = part == kInside ? tile_column : KERNEL_W - 1;
        --a;
      }
      if (a < 0) return false;
    } while (part == kOutside && a <= tile_row && b <= tile_column);
    return true;
  };

  // Outputs of a thread: quads of channels, kThreadsM quads apart; four columns.
  const int thread_m = threadIdx.x % kThreadsM, thread_n = threadIdx.x / kThreadsM;
  Accumulator sums[THREAD_M][4] = {};
  bool more = advance();
  if (more) {
    fetch(a, b, first_input);
    keep(0);
  }
  __syncthreads();
  for (int buffer = 0; more; buffer ^= 1) {
    more = advance();
    if (more) fetch(a, b, first_input);
    const Accumulator* slab_weights = shared + buffer * (kWeightsSize + kPixelsSize);
    const Accumulator* slab_pixels = slab_weights + kWeightsSize;
#pragma unroll
    for (int in = 0; in < kSlab; ++in) {
      const Quad column_values = *reinterpret_cast<const Quad*>(slab_pixels + in * kPixelPitch + thread_n * 4);
#pragma unroll
      for (int quad = 0; quad < THREAD_M / 4; ++quad) {
        const Quad weight =
            *reinterpret_cast<const Quad*>(slab_weights + in * BLOCK_M + (quad * kThreadsM + thread_m) * 4);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int n = 0; n < 4; ++n) sums[quad * 4 + m][n] += weight.values[m] * column_values.values[n];
        }
      }
    }
    // The other buffer was last read a barrier ago.
    if (more) keep(buffer ^ 1);
    __syncthreads();
  }

#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const Column column = locate(first_column + thread_n * 4 + n);
    if (column.image == nullptr) continue;
    Accumulator* to = results + (column.image - images) + ((long long)column.row * width + column.column) * PADDED;
#pragma unroll
    for (int quad = 0; quad < THREAD_M / 4; ++quad) {
      const int output = first_output + (quad * kThreadsM + thread_m) * 4;
      if (output >= PADDED) continue;
      Quad result;
      if (part == kOutside) result = *reinterpret_cast<const Quad*>(to + output);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        result.values[m] = part == kOutside ? result.values[m] - sums[quad * 4 + m][n] : sums[quad * 4 + m][n];
      }
      *reinterpret_cast<Quad*>(to + output) = result;
    }
  }
}
