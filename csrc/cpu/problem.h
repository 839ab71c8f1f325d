// An operator call in plain pointers and numbers, independent of torch.
#pragma once

#include <cstdint>

#include "stencil.h"

namespace kconv {

struct Strides {  // in elements
  int64_t plane, batch, channel, row, column;
};

// From the C library, because kernels may not call the C++ one.
inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }

// output = A input + bias, A^T input + bias, A^-1 (input - bias) or A^-T (input - bias); nflows_kconv/ops.py defines A.
// Images are volumes of one plane.
template <typename T>
struct KernelProblem {
  const T* input;           // [batch, channels, depth, height, width]
  T* output;                // the same shape, must not overlap the input
  const T* weight;          // [channels, channels / groups, kernel_depth, kernel_height, kernel_width], contiguous
                            // if images_differ, weight, bias and log_diagonal have one more axis, the image, first
  const T* bias;            // [channels], contiguous, or null for zero
  const T* log_diagonal;    // [channels], contiguous, the diagonal is its exponential, or null
  const int64_t* stencils;  // one per group
  Strides input_strides, output_strides;
  int64_t depth, batch, channels, height, width;
  int64_t groups, kernel_depth, kernel_height, kernel_width;
  Lag dilation;        // pixels from one tap to the next
  bool unit_diagonal;  // without log_diagonal: whether the diagonal is 1 or the weight's own
  bool transpose, solve;
  bool exchanged;      // whether `in_frame_of` exchanged rows and columns; the kernels' memory is not exchanged
  bool images_differ;  // whether each image has its own weight

  int64_t group_channels() const { return channels / groups; }
  int64_t kernel_taps() const { return kernel_depth * kernel_height * kernel_width; }

  // Returns one image whose groups repeat a cycle of stencils as several images with their own weights.
  KernelProblem with_images_of_groups() const {
    int64_t period = 1;
    for (int64_t group = 1; group < groups; ++group)
      if (stencils[group] != stencils[group % period]) period = group + 1;
    if (batch != 1 || period == groups || groups % period) return *this;
    KernelProblem split = *this;
    split.batch = groups / period;
    split.groups = period;
    split.channels = channels / split.batch;
    for (Strides* strides : {&split.input_strides, &split.output_strides})
      strides->batch = strides->channel * split.channels;
    split.images_differ = true;
    return split;
  }

  bool stores_columns() const { return output_strides.row < output_strides.column; }

  // Returns the problem with rows and columns as in a family's canonical frame, before mirroring.
  KernelProblem in_frame_of(int64_t family) const {
    KernelProblem framed = *this;
    if (family & kExchanged) {
      for (Strides* strides : {&framed.input_strides, &framed.output_strides}) exchange(strides->row, strides->column);
      exchange(framed.height, framed.width);
      exchange(framed.kernel_height, framed.kernel_width);
      exchange(framed.dilation.rows, framed.dilation.columns);
      framed.exchanged = !exchanged;
    }
    return framed;
  }

  // Returns the offset in a kernel of the tap with this lag, in the frame of the stencil's family.
  int64_t tap(int64_t stencil, Lag lag) const {
    const int64_t plane = kernel_depth - 1 - lag.planes, row = kernel_height - 1 - lag.rows;
    const int64_t column = pivot_column(stencil, kernel_width) - lag.columns;
    return (stencil & kMirrorsPlanes ? lag.planes : plane) * kernel_height * kernel_width +
           (stencil & kMirrorsRows ? lag.rows : row) * (exchanged ? 1 : kernel_width) +
           (stencil & kMirrorsColumns ? kernel_width - 1 - column : column) * (exchanged ? kernel_height : 1);
  }

  // Returns the diagonal of the Jacobian in a channel; `own` is the weight's entry.
  T diagonal(int64_t channel, T own) const {
    return log_diagonal ? exponential(log_diagonal[channel]) : unit_diagonal ? T(1) : own;
  }

 private:
  static void exchange(int64_t& a, int64_t& b) {
    const int64_t before = a;
    a = b;
    b = before;
  }
};

// Calls body(begin, end, context) for ranges that cover [0, count), on several threads if count > grain.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// Keep equal to nflows_kconv/backends/native.py.
enum class Outcome : int { done, out_of_memory, declined };

// Runs the problem with the selected instruction set. Declines and does nothing unless the diagonal of a solution, or
// exp(log_diagonal), and its reciprocal are finite and nonzero.
template <typename T>
Outcome run(const KernelProblem<T>& problem, int64_t threads, ParallelFor parallel_for);

// Returns "avx512", "avx2" or "baseline": the widest of the machine, unless another was selected.
const char* instruction_set();

// Returns false and changes nothing if the machine or the build lacks it.
bool select_instruction_set(const char* name);

}  // namespace kconv
