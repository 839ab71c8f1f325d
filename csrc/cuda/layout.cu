// Between tensors of any strides and the dense canonical images that the matrix products read and write,
// [group][image][row][column][PADDED], channels last and padded with zeros, in the type of the sums:
//
//   gather    tensor - bias -> canonical        what a solver is given
//   scatter   canonical + bias -> tensor        what the convolution gives
//
// Both transpose a tile of 32 pixels and 32 channels in shared memory, so that neighbouring threads read and write
// neighbouring addresses. They are bound by memory: each element is read and written once.
//
//   impulses  canonical images, one for each input channel i: 1 in channel i of pixel (0, 0), 0 elsewhere
//
// Constants beside those of arguments.cuh: PADDED. Arguments: offsets[0] = the canonical images; parameters[0] = 1
// if there is a bias to add or take off; for impulses, batch = PADDED.
#include "arguments.cuh"

constexpr int kSide = 32;
constexpr int kThreads = 256;
constexpr int kChannelTiles = ceil_div(PADDED, kSide);

struct Tile {
  int group, image, first_channel, pixels;
  long long first_pixel;
  Accumulator* canonical;  // of this image

  __device__ explicit Tile(const Arguments& arguments) {
    pixels = arguments.height * arguments.width;
    const int pixel_tiles = ceil_div(pixels, kSide);
    long long index = blockIdx.x;
    first_channel = index % kChannelTiles * kSide;
    index /= kChannelTiles;
    first_pixel = index % pixel_tiles * kSide;
    index /= pixel_tiles;
    image = index % arguments.batch;
    group = index / arguments.batch;
    canonical = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[0]) +
                ((long long)group * arguments.batch + image) * pixels * PADDED;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator(*values)[kSide + 1] = reinterpret_cast<Accumulator(*)[kSide + 1]>(shared_memory);
  const Tile tile(arguments);
  const auto view = image_view(static_cast<const SCALAR*>(arguments.first), arguments.first_strides, arguments,
                               tile.image, tile.group);
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int channel = tile.first_channel + i / kSide;
    const long long pixel = tile.first_pixel + i % kSide;
    if (channel < CHANNELS && pixel < tile.pixels) {
      const long long row = pixel / arguments.width, column = pixel % arguments.width;
      const Accumulator value = load(view.data + channel * view.channel + row * view.row + column * view.column);
      const bool biased = arguments.parameters[0];
      values[i / kSide][i % kSide] = biased ? value - bias_of(arguments, tile.group, channel) : value;
    } else {
      values[i / kSide][i % kSide] = 0;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int channel = tile.first_channel + i % kSide;
    const long long pixel = tile.first_pixel + i / kSide;
    if (channel < PADDED && pixel < tile.pixels)
      tile.canonical[pixel * PADDED + channel] = values[i % kSide][i / kSide];
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) scatter(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared_memory[];
  Accumulator(*values)[kSide + 1] = reinterpret_cast<Accumulator(*)[kSide + 1]>(shared_memory);
  const Tile tile(arguments);
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int channel = tile.first_channel + i % kSide;
    const long long pixel = tile.first_pixel + i / kSide;
    if (channel < CHANNELS && pixel < tile.pixels)
      values[i % kSide][i / kSide] = tile.canonical[pixel * PADDED + channel];
  }
  __syncthreads();
  const auto view =
      image_view(static_cast<SCALAR*>(arguments.output), arguments.output_strides, arguments, tile.image, tile.group);
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int channel = tile.first_channel + i / kSide;
    const long long pixel = tile.first_pixel + i % kSide;
    if (channel >= CHANNELS || pixel >= tile.pixels) continue;
    const long long row = pixel / arguments.width, column = pixel % arguments.width;
    const Accumulator value = values[i / kSide][i % kSide];
    store(view.data + channel * view.channel + row * view.row + column * view.column,
          arguments.parameters[0] ? value + bias_of(arguments, tile.group, channel) : value);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) impulses(const __grid_constant__ Arguments arguments) {
  const long long image_size = (long long)arguments.height * arguments.width * PADDED;
  const long long count = arguments.groups * arguments.batch * image_size;
  Accumulator* images = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[0]);
  for (long long i = (long long)blockIdx.x * kThreads + threadIdx.x; i < count; i += (long long)gridDim.x * kThreads) {
    images[i] = i % image_size == i / image_size % arguments.batch;
  }
}
