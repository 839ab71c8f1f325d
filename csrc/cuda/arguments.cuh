// The arguments of every kernel, and the operator as kernels see it: one stencil, one triangle, one direction.
//
// A kernel implements only the *canonical* operator, see nflows_kconv/stencil.py: corner TL or side T, with a lower
// triangular pivot. The pixel at row 0, column 0 depends on no other. Tap (a, b) reads a rows above and b - kRight
// columns to the left, with kRight = 0 for a corner. Tap (0, kRight) is the pivot, and the taps of row 0 before it are
// masked:
//
//     y[o, r, s] = sum_{i, a, b} W(o, i, a, b) x[i, r - a, s + kRight - b] + bias(o),
//                                              W(o, i, 0, b) = 0 for b < kRight, and for b = kRight and i > o
//
// Strides of either sign turn every stencil and the transpose into this operator: a corner reverses rows or columns;
// the transpose has the opposite corner, the same lags, exchanged channels of the weight, and a reversed channel order,
// which makes its upper triangle a lower one. This needs no flips, no copies and no second code path.
//
// The host compiles each source for a problem, with these constants:
//   SCALAR        type of the tensors: float, double, Half or BFloat16
//   CHANNELS      channels of a group, C/G
//   KERNEL_H, KERNEL_W   size of the kernel, clipped to the image (other taps read padding only)
//   TAU           pixels with equal TAU * row + column can be solved at once
//   TRANSPOSE     1 for A^T, 0 for A
//   CORNERS       stencils that groups take in turn; `corners` holds what each mirrors, two bits: columns, rows
#pragma once

#include "scalar.cuh"

// A pixel may read one in the row above so far to the right that it is solved only one step earlier.
constexpr int kRight = TAU - 1;

struct Arguments {
  const void* first;   // x or y, [B, C, H, W]
  const void* second;  // the weight [C, C/G, kh, kw], or the gradient [B, C, H, W]
  void* output;
  char* scratch;               // 256-byte aligned
  const void* bias;            // [C], contiguous, or null
  const void* log_diagonal;    // [C], contiguous, or null, see diagonal_of
  long long first_strides[4];  // all strides in elements
  long long second_strides[4];
  long long output_strides[4];
  int batch, height, width, groups;
  int kernel_h, kernel_w;  // size in memory, before clipping
  int parameters[8];       // of this launch; each source documents its own
  long long offsets[4];    // of regions in the scratch, in bytes; each source documents its own
  int last_column;         // of the kernel in memory, before mirroring: the column of tap (0, 0)
  int unit_diagonal;       // whether the pivot's diagonal is 1, or has no gradient
  unsigned corners[ceil_div(CORNERS, 16)];
};

__device__ inline int corner_of(const Arguments& arguments, int group) {
  const int place = group % CORNERS;
  return arguments.corners[CORNERS > 16 ? place / 16 : 0] >> (place % 16 * 2) & 3;
}

// One image of one group: element (c, r, s) is data[c * channel + r * row + s * column].
template <typename T>
struct ImageView {
  T* data;
  long long channel, row, column;
};

template <typename T>
__device__ inline ImageView<T> image_view(T* data, const long long (&strides)[4], const Arguments& arguments, int image,
                                          int group) {
  const int corner = corner_of(arguments, group) ^ (TRANSPOSE ? 3 : 0);
  ImageView<T> view{data, strides[1], strides[2], strides[3]};
  view.data += image * strides[0] + (long long)group * CHANNELS * strides[1];
  if (TRANSPOSE) {
    view.data += (CHANNELS - 1) * strides[1];
    view.channel = -view.channel;
  }
  if (corner & 2) {
    view.data += (arguments.height - 1) * strides[2];
    view.row = -view.row;
  }
  if (corner & 1) {
    view.data += (arguments.width - 1) * strides[3];
    view.column = -view.column;
  }
  return view;
}

// Returns the element of a vector [C] for a channel of the group.
__device__ inline Accumulator load_channel(const void* vector, int group, int channel) {
  const int at = group * CHANNELS + (TRANSPOSE ? CHANNELS - 1 - channel : channel);
  return load(static_cast<const SCALAR*>(vector) + at);
}

__device__ inline Accumulator bias_of(const Arguments& arguments, int group, int channel) {
  return load_channel(arguments.bias, group, channel);
}

// W(o, i, a, b) of one group is data[o * out + i * in + a * row + b * column]. Readers apply the mask and the diagonal.
template <typename T>
struct WeightView {
  T* data;
  long long out, in, row, column;
};

template <typename T>
__device__ inline WeightView<T> weight_view(T* data, const long long (&strides)[4], const Arguments& arguments,
                                            int group) {
  const int corner = corner_of(arguments, group);
  WeightView<T> view{data, strides[0], strides[1], -strides[2], -strides[3]};
  view.data += (long long)group * CHANNELS * strides[0];
  if (corner & 2) {
    view.row = strides[2];
  } else {
    view.data += (arguments.kernel_h - 1) * strides[2];
  }
  if (corner & 1) {
    view.data += (arguments.kernel_w - 1 - arguments.last_column) * strides[3];
    view.column = strides[3];
  } else {
    view.data += arguments.last_column * strides[3];
  }
  if (TRANSPOSE) {
    view.data += (CHANNELS - 1) * (strides[0] + strides[1]);
    view.out = -strides[1];
    view.in = -strides[0];
  }
  return view;
}

// Returns whether the weight itself holds the pivot's diagonal, W(o, o, 0, kRight).
__device__ inline bool has_own_diagonal(const Arguments& arguments) {
  return !arguments.unit_diagonal && !arguments.log_diagonal;
}

// Returns that diagonal if the weight does not hold it.
__device__ inline Accumulator diagonal_of(const Arguments& arguments, int group, int channel) {
  return arguments.unit_diagonal ? 1 : exp(load_channel(arguments.log_diagonal, group, channel));
}

// Returns an unmasked entry of the pivot, W(o, i, 0, kRight).
template <typename T>
__device__ inline Accumulator load_pivot(const WeightView<T>& weight, const Arguments& arguments, int group, int out,
                                         int in) {
  if (out == in && !has_own_diagonal(arguments)) return diagonal_of(arguments, group, out);
  return load(weight.data + out * weight.out + in * weight.in + kRight * weight.column);
}
