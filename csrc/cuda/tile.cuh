// Tiles of images in shared memory, in the type of the sums and zero outside the image.
#pragma once

#include "arguments.cuh"

__device__ constexpr int clamp(int value, int least, int most) {
  return value < least ? least : value > most ? most : value;
}

// Copies channels x images x rows x columns of one group, starting anywhere, to tile[channel * CHANNEL_PITCH + (image *
// ROW_COUNT + row) * ROW_PITCH + column]. A thread keeps its pixel and walks the channels, to compute one address per
// pixel; neighbouring threads take neighbouring columns.
template <int THREADS, int CHANNEL_COUNT, int IMAGE_COUNT, int ROW_COUNT, int COLUMN_COUNT, int ROW_PITCH,
          int CHANNEL_PITCH>
__device__ inline void copy_tile(Accumulator* tile, const ImageView<const SCALAR>& first_image, long long image_stride,
                                 const Arguments& arguments, int channel, int image, int row, int column,
                                 unsigned thread) {
  constexpr int kPixels = IMAGE_COUNT * ROW_COUNT * COLUMN_COUNT;
  constexpr int kChannelsAtOnce = kPixels < THREADS ? THREADS / kPixels : 1;
  const int first_channel = thread / kPixels;
  if (first_channel >= kChannelsAtOnce) return;
  for (int pixel = thread % kPixels; pixel < kPixels; pixel += THREADS) {
    const int n = pixel / (ROW_COUNT * COLUMN_COUNT), r = pixel / COLUMN_COUNT % ROW_COUNT, s = pixel % COLUMN_COUNT;
    const bool inside = image + n < arguments.batch && (unsigned)(row + r) < (unsigned)arguments.height &&
                        (unsigned)(column + s) < (unsigned)arguments.width;
    const SCALAR* source = first_image.data + (image + n) * image_stride + (row + r) * first_image.row +
                           (column + s) * first_image.column + (channel + first_channel) * first_image.channel;
    Accumulator* target = tile + (n * ROW_COUNT + r) * ROW_PITCH + s + first_channel * CHANNEL_PITCH;
#pragma unroll 4
    for (int c = first_channel; c < CHANNEL_COUNT; c += kChannelsAtOnce) {
      if (inside && channel + c < CHANNELS) {
        copy_to_shared(target, source);
      } else {
        *target = 0;
      }
      source += kChannelsAtOnce * first_image.channel;
      target += kChannelsAtOnce * CHANNEL_PITCH;
    }
  }
}
