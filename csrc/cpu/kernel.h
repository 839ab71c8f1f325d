// The arithmetic, compiled once for each instruction set by the kernel_*.cpp beside this file.
//
// Everything lies in an unnamed namespace and nothing of the standard library is called: a function with external
// linkage, compiled here for a new processor, could replace its namesake elsewhere in the program.
#pragma once

#include <utility>

#include "instruction_sets.h"

namespace kconv {

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
struct VectorOf {
  typedef T Aligned __attribute__((vector_size(KCONV_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(KCONV_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::Aligned;
template <typename T>
constexpr int kLanes = KCONV_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}
template <typename T>
inline void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = value;
}

// ---- Transposition of kLanes vectors -------------------------------------------------------------------------------

#if defined(__clang__)
#define KCONV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
template <typename T>
struct Integer;
template <>
struct Integer<float> {
  using Type = int32_t;
};
template <>
struct Integer<double> {
  using Type = int64_t;
};
#define KCONV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Vector<typename Integer<T>::Type>{__VA_ARGS__})
#endif

// Exchanges the upper right and lower left S x S blocks of the 2S x 2S blocks that two rows S apart cross.
template <int S, typename T, int... I>
inline void exchange(Vector<T>& upper, Vector<T>& lower, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const Vector<T> a = upper, b = lower;
  upper = KCONV_SHUFFLE(a, b, ((I & S) ? n + I - S : I)...);
  lower = KCONV_SHUFFLE(a, b, ((I & S) ? n + I : I + S)...);
}

template <int S, typename T>
inline void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (!(i & S)) exchange<S, T>(rows[i], rows[i + S], std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (2 * S < kLanes<T>) transpose<2 * S, T>(rows);
}

// ---- The inner kernel ----------------------------------------------------------------------------------------------
//
// The floor is one multiply-add a cycle and core with 512 bits (two with 256): 220 GFLOP/s on two cores of the AMD EPYC
// of benchmarks/results. Measured there: 210 GFLOP/s with 128 channels a group, 140 to 160 with 6 to 12, where moving
// the pixels and the lanes that 100 images leave empty cost a fifth.

// Computes O output channels of one position for V vectors of lanes, in place. `offsets` name the `count` inputs that
// are known, `weights` holds O for each of them and then the O x O triangle of the pivot.
template <bool kSolve, int O, int V, typename T>
void compute_tile(T* position, T* outputs, int64_t channel_pitch, const int64_t* offsets, int64_t count,
                  const T* weights) {
  constexpr int n = kLanes<T>;
  Vector<T> sums[O][V];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[o][v] = kSolve ? load(outputs + o * channel_pitch + v * n) : Vector<T>{};

  for (int64_t k = 0; k < count; ++k, weights += O) {
    const T* input = position + offsets[k];
    Vector<T> x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = load(input + v * n);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[o][v] = kSolve ? sums[o][v] - weights[o] * x[v] : sums[o][v] + weights[o] * x[v];
  }

  if constexpr (kSolve) {  // forward substitution; the packed diagonal is inverted
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[i][v] = sums[i][v] * weights[i * O + i];
        store(outputs + i * channel_pitch + v * n, sums[i][v]);
#pragma GCC unroll 8
        for (int o = i + 1; o < O; ++o) sums[o][v] = sums[o][v] - weights[o * O + i] * sums[i][v];
      }
  } else {  // all inputs are read before an output takes their place
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vector<T> x = load(outputs + i * channel_pitch + v * n);
#pragma GCC unroll 8
        for (int o = i; o < O; ++o) sums[o][v] = sums[o][v] + weights[o * O + i] * x;
      }
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(outputs + o * channel_pitch + v * n, sums[o][v]);
  }
}

template <typename T>
using TileKernel = void (*)(T*, T*, int64_t, const int64_t*, int64_t, const T*);

template <bool kSolve, typename T>
TileKernel<T> tile_kernel(int64_t size, int64_t vectors) {
#define KCONV_ROW(O)                                                                             \
  {                                                                                              \
    compute_tile<kSolve, O, 1, T>, compute_tile<kSolve, O, 2, T>, compute_tile<kSolve, O, 3, T>, \
        compute_tile<kSolve, O, 4, T>                                                            \
  }
  static constexpr TileKernel<T> kernels[kMaxTile][kMaxVectors] = {KCONV_ROW(1), KCONV_ROW(2), KCONV_ROW(3),
                                                                   KCONV_ROW(4), KCONV_ROW(5), KCONV_ROW(6)};
#undef KCONV_ROW
  return kernels[size - 1][vectors - 1];
}

// ---- Weights -------------------------------------------------------------------------------------------------------

template <typename T>
void pack_weights(const Problem<T>& problem, const Plan& plan, int64_t group, int64_t index, T* packed) {
  const int64_t channels = plan.channels, area = problem.kernel_height * problem.kernel_width;
  const int64_t stencil = problem.stencils[group];
  const bool transpose = problem.transpose;

  // The weight of canonical output o and input i at a tap is
  // origin[o * output_stride + i * input_stride + problem.tap(stencil, lag)].
  const int64_t output_stride = transpose ? -area : channels * area, input_stride = transpose ? -channels * area : area;
  const T* origin = problem.weight + group * channels * channels * area;
  origin += transpose ? (channels * channels - 1) * area : 0;

  const Tile& tile = plan.tiles[index];
  const T* outputs = origin + tile.first * output_stride;
  T* to = packed + tile.weights;
  for (int64_t tap = 0; tap < plan.tap_count; ++tap) {
    const T* inputs = outputs + problem.tap(stencil, plan.taps[tap]);
    const int64_t known = tap == plan.tap_count - 1 ? tile.first : channels;
    for (int64_t i = 0; i < known; ++i)
      for (int64_t o = 0; o < tile.size; ++o) *to++ = inputs[o * output_stride + i * input_stride];
  }
  outputs += problem.tap(stencil, {0, 0});
  for (int64_t o = 0; o < tile.size; ++o)
    for (int64_t i = 0; i < tile.size; ++i) {
      T value = i <= o ? outputs[o * output_stride + (tile.first + i) * input_stride] : T(0);
      if (i == o) {
        const int64_t canonical = tile.first + o;
        value = problem.diagonal(group * channels + (transpose ? channels - 1 - canonical : canonical), value);
      }
      *to++ = problem.solve && i == o ? 1 / value : value;
    }
}

// ---- Pixels to and from the buffer ---------------------------------------------------------------------------------

// Canonical rows [begin, end) of one group of some images, and where they lie in the buffer.
template <typename T>
struct Strip {
  const Problem<T>& problem;
  const Plan& plan;
  bool flip_rows, flip_columns, by_columns;
  int64_t images;  // lanes in use, where lanes are images
  const T* bias;   // of the group's channels, or null
  T* buffer;
  int64_t* places;

  // Elements from the buffer's start, in the order in which the tensor stores the pixels: row by row or, `by_columns`,
  // column by column. `top` is the canonical row of the buffer's first pixel.
  void place(int64_t begin, int64_t end, int64_t top) const {
    const int64_t rows = end - begin, width = problem.width;
    const int64_t row_step =
        plan.lanes_are_rows ? plan.skew * plan.position_pitch + 1 : plan.row_positions * plan.position_pitch;
    const int64_t first = plan.first_position * plan.position_pitch + plan.halo_lanes + (begin - top) * row_step;
    int64_t* to = places;
    for (int64_t i = 0; i < (by_columns ? width : rows); ++i)
      for (int64_t j = 0; j < (by_columns ? rows : width); ++j) {
        const int64_t row = by_columns ? j : i, column = by_columns ? i : j;
        *to++ = first + (flip_rows ? rows - 1 - row : row) * row_step +
                (flip_columns ? width - 1 - column : column) * plan.position_pitch;
      }
  }

  // Moves the rows, taking the bias off on their way to the buffer or adding it on their way back, if there is one and
  // kShift says so.
  template <bool kToBuffer, bool kShift, typename Pointer>
  void move(Pointer group_pixels, const Strides& strides, int64_t begin, int64_t end) const {
    if (kShift && bias)
      move_shifted<kToBuffer, true>(group_pixels, strides, begin, end);
    else
      move_shifted<kToBuffer, false>(group_pixels, strides, begin, end);
  }

 private:
  template <bool kToBuffer, bool kShift, typename Pointer>
  void move_shifted(Pointer group_pixels, const Strides& strides, int64_t begin, int64_t end) const {
    const int64_t first_row = flip_rows ? problem.height - end : begin;
    const int64_t lines = by_columns ? problem.width : end - begin, length = by_columns ? end - begin : problem.width;
    const int64_t line_stride = by_columns ? strides.column : strides.row;
    const int64_t stride = by_columns ? strides.row : strides.column;
    const bool contiguous = stride == 1 && (line_stride == length || lines == 1);
    for (int64_t channel = 0; channel < plan.channels; ++channel) {
      Pointer pixels = group_pixels + channel * strides.channel + first_row * strides.row;
      T* lanes = buffer + (problem.transpose ? plan.channels - 1 - channel : channel) * plan.channel_pitch;
      const T shift = !kShift ? T(0) : kToBuffer ? -bias[channel] : bias[channel];
      if (contiguous) {
        move_run<kToBuffer, kShift>(pixels, 1, strides.batch, lines * length, places, lanes, shift);
      } else {
        for (int64_t line = 0; line < lines; ++line)
          move_run<kToBuffer, kShift>(pixels + line * line_stride, stride, strides.batch, length,
                                      places + line * length, lanes, shift);
      }
    }
  }

  // Moves pixels of one channel of all images.
  template <bool kToBuffer, bool kShift, typename Pointer>
  void move_run(Pointer pixels, int64_t stride, int64_t batch_stride, int64_t count, const int64_t* run_places,
                T* lanes, T shift) const {
    if (plan.lanes_are_rows) {
      for (int64_t p = 0; p < count; ++p) copy<kToBuffer, kShift>(pixels + p * stride, lanes + run_places[p], shift);
      return;
    }
    constexpr int n = kLanes<T>;
    for (int64_t first = 0; first < images; first += n) {  // a vector of lanes
      const int64_t present = smaller(n, images - first);
      Pointer images_pixels = pixels + first * batch_stride;
      for (int64_t p = 0; p < count; p += n) {
        const int64_t pixels_here = smaller(n, count - p);
        if (stride == 1 && pixels_here == n) {
          move_square<kToBuffer, kShift>(images_pixels + p, batch_stride, present, run_places + p, lanes + first,
                                         shift);
          continue;
        }
        // Image by image: pixels of one image share a cache line, those of many images may evict each other.
        for (int64_t image = 0; image < present; ++image)
          for (int64_t q = p; q < p + pixels_here; ++q)
            copy<kToBuffer, kShift>(images_pixels + image * batch_stride + q * stride,
                                    lanes + run_places[q] + first + image, shift);
      }
    }
  }

  template <bool kToBuffer, bool kShift, typename Pointer>
  static void move_square(Pointer pixels, int64_t batch_stride, int64_t present, const int64_t* run_places, T* lanes,
                          T shift) {
    constexpr int n = kLanes<T>;
    Vector<T> square[n];
    for (int i = 0; i < n; ++i) {
      if constexpr (kToBuffer)
        square[i] = i < present ? load(pixels + i * batch_stride) : Vector<T>{};
      else
        square[i] = load(lanes + run_places[i]);
      if constexpr (kShift) square[i] = square[i] + shift;
    }
    transpose<1, T>(square);
    if constexpr (kToBuffer)
      for (int i = 0; i < n; ++i) store(lanes + run_places[i], square[i]);
    else
      for (int64_t i = 0; i < present; ++i) store(pixels + i * batch_stride, square[i]);
  }

  template <bool kToBuffer, bool kShift, typename Pointer>
  static void copy(Pointer pixel, T* lane, T shift) {
    if constexpr (kToBuffer)
      *lane = kShift ? *pixel + shift : *pixel;
    else
      *pixel = kShift ? *lane + shift : *lane;
  }
};

// ---- Tasks ---------------------------------------------------------------------------------------------------------

template <bool kSolve, typename T>
void compute_position(T* position, const Plan& plan, const T* packed, const TileKernel<T>* kernels) {
  const int64_t inputs = (plan.tap_count - 1) * plan.channels;
  for (int64_t t = 0; t < plan.tile_count; ++t) {
    const Tile& tile = plan.tiles[kSolve ? t : plan.tile_count - 1 - t];
    kernels[tile.size - 1](position, position + tile.first * plan.channel_pitch, plan.channel_pitch, plan.offsets,
                           inputs + tile.first, packed + tile.weights);
  }
}

template <typename T>
void clear_borders(const Plan& plan, T* buffer) {
  if (plan.lanes_are_rows) {
    __builtin_memset(buffer, 0, plan.buffer_size * sizeof(T));
    return;
  }
  const int64_t above = plan.rows_above * plan.row_positions * plan.position_pitch;
  __builtin_memset(buffer, 0, above * sizeof(T));
  const int64_t row = plan.row_positions * plan.position_pitch, left = plan.halo_positions * plan.position_pitch;
  for (T* to = buffer + above; to < buffer + plan.buffer_size; to += row) __builtin_memset(to, 0, left * sizeof(T));
}

// Where taps read to the right, a solution must not leave anything beyond the ends of the rows that are lanes: only
// rows [first, last) have a pixel at this step, and others would read it.
template <typename T>
void clear_outside(T* position, const Plan& plan, int64_t first, int64_t last) {
  for (int64_t channel = 0; channel < plan.channels; ++channel, position += plan.channel_pitch) {
    for (int64_t lane = 0; lane < first; ++lane) position[lane] = 0;
    for (int64_t lane = last; lane < plan.lanes_per_vector; ++lane) position[lane] = 0;
  }
}

// A convolution goes through strips, positions and channels in the reverse order of a solution: each output then takes
// the place of an input that no later output reads.
template <bool kSolve, typename T>
void run_task(const Problem<T>& problem, const Plan& plan, const T* packed, int64_t group, int64_t block, T* buffer,
              int64_t* places) {
  const int64_t stencil = problem.transpose ? opposite(problem.stencils[group]) : problem.stencils[group];
  const int64_t block_images = plan.lanes_are_rows ? 1 : plan.vectors * plan.lanes_per_vector;
  const int64_t first_image = block * block_images;
  const int64_t images = smaller(block_images, problem.batch - first_image);
  const int64_t first_channel = group * plan.channels;
  const T* input =
      problem.input + first_image * problem.input_strides.batch + first_channel * problem.input_strides.channel;
  T* output =
      problem.output + first_image * problem.output_strides.batch + first_channel * problem.output_strides.channel;
  const T* bias = problem.bias ? problem.bias + first_channel : nullptr;
  const Strip<T> strip{problem,
                       plan,
                       (stencil & kMirrorsRows) != 0,
                       (stencil & kMirrorsColumns) != 0,
                       problem.output_strides.row < problem.output_strides.column,
                       images,
                       bias,
                       buffer,
                       places};

  const int64_t vectors = divide_up(images, plan.lanes_per_vector);
  TileKernel<T> kernels[kMaxTile];
  for (int64_t size = 1; size <= kMaxTile; ++size) kernels[size - 1] = tile_kernel<kSolve, T>(size, vectors);

  const int64_t strips = divide_up(problem.height, plan.strip_rows);
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t top = (kSolve ? s : strips - 1 - s) * plan.strip_rows;
    const int64_t bottom = smaller(top + plan.strip_rows, problem.height);
    const int64_t halo_top = larger(0, top - plan.rows_above);
    clear_borders(plan, buffer);
    if (halo_top < top) {
      strip.place(halo_top, top, top);
      if constexpr (kSolve)
        strip.template move<true, false>(const_cast<const T*>(output), problem.output_strides, halo_top, top);
      else
        strip.template move<true, false>(input, problem.input_strides, halo_top, top);
    }
    strip.place(top, bottom, top);
    strip.template move<true, kSolve>(input, problem.input_strides, top, bottom);

    const int64_t lines = plan.lanes_are_rows ? 1 : bottom - top;
    const int64_t steps = plan.lanes_are_rows ? problem.width + plan.skew * (bottom - top - 1) : problem.width;
    T* first = buffer + plan.first_position * plan.position_pitch + plan.halo_lanes;
    for (int64_t i = 0; i < lines; ++i) {
      T* line = first + (kSolve ? i : lines - 1 - i) * plan.row_positions * plan.position_pitch;
      for (int64_t j = 0; j < steps; ++j) {
        T* position = line + (kSolve ? j : steps - 1 - j) * plan.position_pitch;
        compute_position<kSolve>(position, plan, packed, kernels);
        if (kSolve && plan.lanes_are_rows && plan.right > 0)
          clear_outside(position, plan, larger(0, divide_up(j - problem.width + 1, plan.skew)),
                        smaller(j / plan.skew + 1, plan.lanes_per_vector));
      }
    }
    strip.template move<false, !kSolve>(output, problem.output_strides, top, bottom);
  }
}

template <typename T>
void run_either_task(const Problem<T>& problem, const Plan& plan, const T* packed, int64_t group, int64_t block,
                     T* buffer, int64_t* places) {
  if (problem.solve)
    run_task<true>(problem, plan, packed, group, block, buffer, places);
  else
    run_task<false>(problem, plan, packed, group, block, buffer, places);
}

template <typename T>
constexpr Kernels<T> make_kernels(int registers, int max_vectors) {
  return {{KCONV_VECTOR_BYTES, registers, max_vectors}, pack_weights<T>, run_either_task<T>};
}

}  // namespace
}  // namespace kconv
