// The arithmetic, compiled once per instruction set by kernel_*.cpp.
//
// Everything is in an unnamed namespace, and nothing calls the standard library: a function with external linkage,
// compiled here for a new processor, could replace its namesake elsewhere in the program.
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

// Exchanges the upper right and lower left S x S blocks of each 2S x 2S block, for two rows S apart.
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
// The bound is one 512-bit multiply-add per cycle and core (two of 256 bits): 220 GFLOP/s on two cores of the AMD EPYC
// of benchmarks/results. Measured there: 210 GFLOP/s with 128 channels per group, 140 to 160 with 6 to 12, where moving
// pixels and the lanes that 100 images leave empty cost a fifth.

// Computes O output channels of one position for V vectors of lanes, in place. `offsets` locate the `count` known
// inputs. `weights` holds O weights for each of them, then the O x O triangle of the pivot; if lanes differ, a vector
// of each.
template <bool kSolve, bool kLanesDiffer, int O, int V, typename T>
void compute_tile(T* position, T* outputs, int64_t channel_pitch, const int64_t* offsets, int64_t count,
                  const T* weights) {
  constexpr int n = kLanes<T>;
  const auto weight = [&weights](int64_t index) {
    if constexpr (kLanesDiffer)
      return load(weights + index * n);
    else
      return weights[index];
  };
  Vector<T> sums[O][V];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[o][v] = kSolve ? load(outputs + o * channel_pitch + v * n) : Vector<T>{};

  for (int64_t k = 0; k < count; ++k, weights += kLanesDiffer ? O * n : O) {
    const T* input = position + offsets[k];
    Vector<T> x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = load(input + v * n);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[o][v] = kSolve ? sums[o][v] - weight(o) * x[v] : sums[o][v] + weight(o) * x[v];
  }

  if constexpr (kSolve) {  // forward substitution with the inverted diagonal
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[i][v] = sums[i][v] * weight(i * O + i);
        store(outputs + i * channel_pitch + v * n, sums[i][v]);
#pragma GCC unroll 8
        for (int o = i + 1; o < O; ++o) sums[o][v] = sums[o][v] - weight(o * O + i) * sums[i][v];
      }
  } else {  // reads all inputs before an output replaces them
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vector<T> x = load(outputs + i * channel_pitch + v * n);
#pragma GCC unroll 8
        for (int o = i; o < O; ++o) sums[o][v] = sums[o][v] + weight(o * O + i) * x;
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
TileKernel<T> tile_kernel(int64_t size, int64_t vectors, bool lanes_differ) {
#define KCONV_ROW(O)                                                                                                  \
  {                                                                                                                   \
    compute_tile<kSolve, false, O, 1, T>, compute_tile<kSolve, false, O, 2, T>, compute_tile<kSolve, false, O, 3, T>, \
        compute_tile<kSolve, false, O, 4, T>                                                                          \
  }
  static constexpr TileKernel<T> kernels[kMaxTile][kMaxVectors] = {KCONV_ROW(1), KCONV_ROW(2), KCONV_ROW(3),
                                                                   KCONV_ROW(4), KCONV_ROW(5), KCONV_ROW(6)};
#undef KCONV_ROW
  static constexpr TileKernel<T> differing[kMaxTile] = {
      compute_tile<kSolve, true, 1, 1, T>, compute_tile<kSolve, true, 2, 1, T>, compute_tile<kSolve, true, 3, 1, T>,
      compute_tile<kSolve, true, 4, 1, T>, compute_tile<kSolve, true, 5, 1, T>, compute_tile<kSolve, true, 6, 1, T>};
  return lanes_differ ? differing[size - 1] : kernels[size - 1][vectors - 1];
}

// Broadcasts lane `index` of a vector.
template <typename T>
inline Vector<T> lane(Vector<T> vector, int64_t index) {
#if defined(__clang__)
  return Vector<T>{} + vector[index];
#else
  return __builtin_shuffle(vector, Vector<typename Integer<T>::Type>{} + typename Integer<T>::Type(index));
#endif
}

// If lanes are channels: computes V vectors of output channels, at most `own` channels, starting at `outputs`, of P
// pixels, in place. `weights` holds V vectors for the scale of y, for each of the `known` inputs, and for each column
// of the pivot's triangle, which a convolution counts as known. Adds the inputs [begin, end): a convolution passes all
// at once, a solution passes ranges in order.
template <bool kSolve, int V, int P, typename T>
void compute_channels(T* const* pixels, int64_t outputs, int64_t own, const int64_t* offsets, int64_t begin,
                      int64_t end, int64_t known, const T* weights) {
  constexpr int n = kLanes<T>;
  Vector<T> sums[V][P];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      sums[v][p] = !kSolve      ? Vector<T>{}
                   : begin == 0 ? load(pixels[p] + outputs + v * n) * load(weights + v * n)
                                : load(pixels[p] + outputs + v * n);
  weights += (1 + begin) * V * n;

  for (int64_t k = begin; k < (kSolve ? end : end + own); ++k, weights += V * n) {
    Vector<T> w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = load(weights + v * n);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const T x = pixels[p][offsets[k]];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[v][p] = kSolve ? sums[v][p] - w[v] * x : sums[v][p] + w[v] * x;
    }
  }
  if (kSolve && end == known)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i)
      for (int64_t column = 0; column < smaller(n, own - i * n); ++column, weights += V * n)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const Vector<T> x = lane<T>(sums[i][p], column);
#pragma GCC unroll 8
          for (int v = i; v < V; ++v) sums[v][p] = sums[v][p] - load(weights + v * n) * x;
        }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(pixels[p] + outputs + v * n, sums[v][p]);
}

template <typename T>
using ChannelsKernel = void (*)(T* const*, int64_t, int64_t, const int64_t*, int64_t, int64_t, int64_t, const T*);

template <bool kSolve, typename T>
ChannelsKernel<T> channels_kernel(int64_t vectors, int64_t pixels) {
#define KCONV_ROW(V)                                                                                             \
  {                                                                                                              \
    compute_channels<kSolve, V, 1, T>, compute_channels<kSolve, V, 2, T>, compute_channels<kSolve, V, 3, T>,     \
        compute_channels<kSolve, V, 4, T>, compute_channels<kSolve, V, 5, T>, compute_channels<kSolve, V, 6, T>, \
        compute_channels<kSolve, V, 7, T>, compute_channels<kSolve, V, 8, T>                                     \
  }
  static constexpr ChannelsKernel<T> kernels[kMaxChannelVectors][kMaxPixels] = {KCONV_ROW(1), KCONV_ROW(2),
                                                                                KCONV_ROW(3)};
#undef KCONV_ROW
  return kernels[vectors - 1][pixels - 1];
}

// ---- Weights -------------------------------------------------------------------------------------------------------

// If lanes are channels and A is not transposed: packs the columns of the known inputs and of the tile's own, including
// the whole square around the triangle. In memory, the weights of an output are a row of [input, tap]; this transposes
// squares of them.
template <typename T>
void pack_columns(const KernelProblem<T>& problem, const TaskPlan& plan, int64_t stencil, const Tile& tile, int64_t own,
                  const T* outputs, int64_t output_stride, const T* scales, T* to) {
  constexpr int n = kLanes<T>;
  const int64_t channels = plan.channels, kernel_taps = problem.kernel_taps(), count = channels * kernel_taps;
  const int64_t pivot = plan.tap_count - 1, end = tile.first + own, size = tile.size;
  const int64_t* const places = plan.places + mirrors(stencil) * kernel_taps;
  for (int64_t first = 0; first < size; first += n) {
    for (int64_t start = 0; start < count; start += n) {
      start = smaller(start, count - n);  // the last square overlaps the one before
      Vector<T> square[n];
      for (int i = 0; i < n; ++i)
        square[i] =
            first + i < own ? load(outputs + (first + i) * output_stride + start) * scales[first + i] : Vector<T>{};
      transpose<1, T>(square);
      int64_t input = start / kernel_taps, tap = start % kernel_taps;
      for (int i = 0; i < n; ++i) {
        const int64_t place = places[tap];
        if (place >= 0 && (place < pivot || input < end))
          store(to + (place * channels + input) * size + first, square[i]);
        if (++tap == kernel_taps) ++input, tap = 0;
      }
    }
  }
}

// The weights and the diagonal of a group. The weight of canonical output o and input i at a tap is origin[o *
// output_stride + i * input_stride + problem.tap(stencil, lag)].
template <typename T>
struct GroupWeights {
  const KernelProblem<T>& problem;
  int64_t channels, stencil, first_channel, output_stride, input_stride;
  const T* origin;

  GroupWeights(const KernelProblem<T>& problem, int64_t group, int64_t image)
      : problem(problem), channels(problem.group_channels()), stencil(problem.stencils[group]) {
    const int64_t taps = problem.kernel_taps(), sign = problem.transpose ? -1 : 1;
    first_channel = image * problem.channels + group * channels;
    output_stride = sign * (problem.transpose ? 1 : channels) * taps;
    input_stride = sign * (problem.transpose ? channels : 1) * taps;
    origin = problem.weight + first_channel * channels * taps;
    if (problem.transpose) origin += (channels * channels - 1) * taps;
  }

  const T* outputs(int64_t first, Lag lag) const { return origin + first * output_stride + problem.tap(stencil, lag); }

  T diagonal(int64_t output) const {
    const int64_t channel = first_channel + (problem.transpose ? channels - 1 - output : output);
    return problem.diagonal(channel, outputs(output, {0, 0, 0})[output * input_stride]);
  }
};

// If each lane has its own weights: packs vectors with the weights of the images of a block.
template <typename T>
void pack_lanes(const KernelProblem<T>& problem, const TaskPlan& plan, int64_t group, int64_t block, const Tile& tile,
                T* to) {
  constexpr int n = kLanes<T>;
  const GroupWeights<T> first(problem, group, block * n);
  const int64_t channels = plan.channels, size = tile.size,
                image_weights = problem.channels * channels * problem.kernel_taps();
  int64_t images[n];  // lanes without an image get the weights of the last one
  for (int64_t lane = 0; lane < n; ++lane) images[lane] = smaller(lane, problem.batch - 1 - block * n);
  const auto put = [&](int64_t place, const T* weight) {
    Vector<T> lanes;
    for (int lane = 0; lane < n; ++lane) lanes[lane] = weight[images[lane] * image_weights];
    store(to + place * n, lanes);
  };
  const int64_t pivot = plan.tap_count - 1, triangle = (pivot * channels + tile.first) * size;
  for (int64_t o = 0; o < size; ++o) {  // in the order of memory
    for (int64_t tap = 0; tap < plan.tap_count; ++tap) {
      const T* inputs = first.outputs(tile.first + o, plan.taps[tap]);
      for (int64_t i = 0; i < (tap == pivot ? tile.first : channels); ++i)
        put((tap * channels + i) * size + o, inputs + i * first.input_stride);
      for (int64_t i = 0; tap == pivot && i < o; ++i)
        put(triangle + o * size + i, inputs + (tile.first + i) * first.input_stride);
    }
    for (int64_t lane = 0; lane < n; ++lane) {
      const T diagonal = GroupWeights<T>(problem, group, block * n + images[lane]).diagonal(tile.first + o);
      to[(triangle + o * size + o) * n + lane] = problem.solve ? 1 / diagonal : diagonal;
    }
  }
}

template <typename T>
void pack_weights(const KernelProblem<T>& problem, const TaskPlan& plan, int64_t group, int64_t block, int64_t index,
                  T* packed) {
  if (plan.weight_lanes > 1) {
    const Tile& tile = plan.tiles[index];
    return pack_lanes(problem, plan, group, block, tile, packed + tile.weights * plan.weight_lanes);
  }
  const GroupWeights<T> weights(problem, group, problem.images_differ ? block : 0);
  const int64_t channels = plan.channels, kernel_taps = problem.kernel_taps(), stencil = weights.stencil;
  const int64_t output_stride = weights.output_stride, input_stride = weights.input_stride;
  const bool transpose = problem.transpose;

  const Tile& tile = plan.tiles[index];
  const T* outputs = weights.origin + tile.first * output_stride;
  const int64_t own = smaller(tile.size, channels - tile.first);  // the last tile may be padded, if lanes are channels
  const bool filled = plan.lanes == Lanes::channels, scaled = filled && problem.solve;
  const T* const pivot = weights.outputs(tile.first, {0, 0, 0});
  const auto diagonal = [&](int64_t o) { return weights.diagonal(tile.first + o); };
  T* to = packed + tile.weights;
  const T* const scales = to;
  for (int64_t o = 0; filled && o < tile.size; ++o) *to++ = scaled && o < own ? 1 / diagonal(o) : T(1);
  if (filled && !transpose && channels * kernel_taps >= kLanes<T>) {
    pack_columns(problem, plan, stencil, tile, own, outputs, output_stride, scales, to);
    to += ((plan.tap_count - 1) * channels + tile.first) * tile.size;
    for (int64_t i = 0; i < own; ++i, to += tile.size) {  // entries above the diagonal may be anything
      for (int64_t o = 0; o < i; ++o) to[o] = 0;
      to[i] = problem.solve ? T(0) : diagonal(i);
    }
    return;
  }
  for (int64_t tap = 0; tap < plan.tap_count; ++tap) {
    const T* inputs = outputs + problem.tap(stencil, plan.taps[tap]);
    const int64_t known = tap == plan.tap_count - 1 ? tile.first : channels;
    for (int64_t i = 0; i < known; ++i)
      for (int64_t o = 0; o < tile.size; ++o) {
        const T weight = o < own ? inputs[o * output_stride + i * input_stride] : T(0);
        *to++ = scaled ? scales[o] * weight : weight;
      }
  }
  // The triangle: its columns, or for a solution its rows with the diagonal inverted.
  for (int64_t j = 0; j < own; ++j)
    for (int64_t k = 0; k < tile.size; ++k) {
      const int64_t o = filled ? k : j, i = filled ? j : k;
      if (o < i || o >= own)
        *to++ = 0;
      else if (o == i)
        *to++ = !problem.solve ? diagonal(o) : filled ? T(0) : 1 / diagonal(o);
      else
        *to++ = (scaled ? scales[o] : T(1)) * pivot[o * output_stride + (tile.first + i) * input_stride];
    }
}

// ---- Pixels to and from the buffer ---------------------------------------------------------------------------------

// Canonical rows [begin, end) of all planes of one group of some images, and their place in the buffer.
template <typename T>
struct Strip {
  const KernelProblem<T>& problem;
  const TaskPlan& plan;
  bool flip_planes, flip_rows, flip_columns, by_columns;
  int64_t images;  // lanes in use, if lanes are images
  const T* bias;   // of the group's channels, or null
  T* buffer;
  int64_t* places;

  // Offsets from a plane's start, in the tensor's storage order: row by row or, if `by_columns`, column by column.
  // `top` is the canonical row of the buffer's first pixel.
  void place(int64_t begin, int64_t end, int64_t top) const {
    const int64_t rows = end - begin, width = problem.width;
    const int64_t row_step =
        plan.lanes == Lanes::rows ? plan.skew * plan.position_pitch + 1 : plan.row_positions * plan.position_pitch;
    const int64_t first = plan.first_pixel - plan.first_plane + (begin - top) * row_step;
    int64_t* to = places;
    for (int64_t i = 0; i < (by_columns ? width : rows); ++i)
      for (int64_t j = 0; j < (by_columns ? rows : width); ++j) {
        const int64_t row = by_columns ? j : i, column = by_columns ? i : j;
        *to++ = first + (flip_rows ? rows - 1 - row : row) * row_step +
                (flip_columns ? width - 1 - column : column) * plan.position_pitch;
      }
  }

  // Moves the rows, and if there is a bias and kShift is set, subtracts it on the way to the buffer or adds it on the
  // way back.
  template <bool kToBuffer, bool kShift, typename Pointer>
  void move(Pointer group_pixels, const Strides& strides, int64_t begin, int64_t end) const {
    if (kShift && bias)
      move_shifted<kToBuffer, true>(group_pixels, strides, begin, end);
    else
      move_shifted<kToBuffer, false>(group_pixels, strides, begin, end);
  }

 private:
  // Images or channels of the tensor: strides of pixels, and of the bias, from one to the next.
  struct Axis {
    int64_t count, stride, bias_stride;
  };

  template <bool kToBuffer, bool kShift, typename Pointer>
  void move_shifted(Pointer pixels, const Strides& strides, int64_t begin, int64_t end) const {
    const int64_t lines = by_columns ? problem.width : end - begin, length = by_columns ? end - begin : problem.width;
    const int64_t line_stride = by_columns ? strides.column : strides.row;
    const int64_t stride = by_columns ? strides.row : strides.column;
    const bool contiguous = stride == 1 && (line_stride == length || lines == 1);

    const int64_t sign = problem.transpose ? -1 : 1;
    const Axis image_axis{images, strides.batch, problem.images_differ ? problem.channels : 0};
    const Axis channel_axis{plan.channels, sign * strides.channel, sign};
    const bool channels = plan.lanes == Lanes::channels;
    const Axis &each = channels ? image_axis : channel_axis, &lane = channels ? channel_axis : image_axis;
    const int64_t pitch = channels ? plan.image_pitch : plan.channel_pitch;

    const int64_t first_channel = problem.transpose ? plan.channels - 1 : 0;
    pixels += first_channel * strides.channel + (flip_rows ? problem.height - end : begin) * strides.row;
    for (int64_t i = 0; i < each.count; ++i, pixels += each.stride) {
      T* lanes = buffer + plan.first_plane + i * pitch;
      const T* shift = kShift ? bias + first_channel + i * each.bias_stride : nullptr;
      for (int64_t z = 0; z < problem.depth; ++z) {
        Pointer plane = pixels + z * strides.plane;
        T* to = lanes + (flip_planes ? problem.depth - 1 - z : z) * plan.plane_pitch;
        if (contiguous) {
          move_run<kToBuffer, kShift>(plane, 1, lane, lines * length, places, to, shift);
        } else {
          for (int64_t line = 0; line < lines; ++line)
            move_run<kToBuffer, kShift>(plane + line * line_stride, stride, lane, length, places + line * length, to,
                                        shift);
        }
      }
    }
  }

  // Moves pixels of one channel of all images, or of all channels of one image.
  template <bool kToBuffer, bool kShift, typename Pointer>
  void move_run(Pointer pixels, int64_t stride, const Axis& lane, int64_t count, const int64_t* run_places, T* lanes,
                const T* shift) const {
    if (plan.lanes == Lanes::rows) {
      for (int64_t p = 0; p < count; ++p) copy<kToBuffer, kShift>(pixels + p * stride, lanes + run_places[p], shift);
      return;
    }
    constexpr int n = kLanes<T>;
    for (int64_t first = 0; first < lane.count; first += n) {  // a vector of lanes
      const int64_t present = smaller(n, lane.count - first);
      Pointer from = pixels + first * lane.stride;
      const T* shifts = kShift ? shift + first * lane.bias_stride : nullptr;
      for (int64_t p = 0; p < count; p += n) {
        const int64_t pixels_here = smaller(n, count - p);
        if (stride == 1 && pixels_here == n) {
          move_square<kToBuffer, kShift>(from + p, lane, present, run_places + p, lanes + first, shifts);
          continue;
        }
        // Zeros in the other lanes, because arithmetic on denormal numbers left there would be slow.
        for (int64_t q = p; kToBuffer && present < n && q < p + pixels_here; ++q)
          store(lanes + run_places[q] + first, Vector<T>{});
        // Lane by lane, because pixels of one image share cache lines, while pixels of many images may evict each
        // other.
        for (int64_t i = 0; i < present; ++i)
          for (int64_t q = p; q < p + pixels_here; ++q)
            copy<kToBuffer, kShift>(from + i * lane.stride + q * stride, lanes + run_places[q] + first + i,
                                    kShift ? shifts + i * lane.bias_stride : nullptr);
      }
    }
  }

  template <bool kToBuffer, bool kShift, typename Pointer>
  static void move_square(Pointer pixels, const Axis& lane, int64_t present, const int64_t* run_places, T* lanes,
                          const T* shifts) {
    constexpr int n = kLanes<T>;
    Vector<T> square[n];
    const auto shifted = [&](Vector<T> pixels_of_lane, int64_t i) {
      if constexpr (kShift)
        return kToBuffer ? pixels_of_lane - shifts[i * lane.bias_stride]
                         : pixels_of_lane + shifts[i * lane.bias_stride];
      else
        return pixels_of_lane;
    };
    if constexpr (kToBuffer) {
      for (int i = 0; i < n; ++i) square[i] = i < present ? shifted(load(pixels + i * lane.stride), i) : Vector<T>{};
      transpose<1, T>(square);
      for (int i = 0; i < n; ++i) store(lanes + run_places[i], square[i]);
    } else {
      for (int i = 0; i < n; ++i) square[i] = load(lanes + run_places[i]);
      transpose<1, T>(square);
      for (int64_t i = 0; i < present; ++i) store(pixels + i * lane.stride, shifted(square[i], i));
    }
  }

  template <bool kToBuffer, bool kShift, typename Pointer>
  static void copy(Pointer pixel, T* lane, const T* shift) {
    if constexpr (kToBuffer)
      *lane = kShift ? *pixel - *shift : *pixel;
    else
      *pixel = kShift ? *lane + *shift : *lane;
  }
};

// ---- Tasks ---------------------------------------------------------------------------------------------------------

template <bool kSolve, typename T>
void compute_position(T* position, const TaskPlan& plan, const T* packed, const TileKernel<T>* kernels) {
  const int64_t inputs = (plan.tap_count - 1) * plan.channels;
  for (int64_t t = 0; t < plan.tile_count; ++t) {
    const Tile& tile = plan.tiles[kSolve ? t : plan.tile_count - 1 - t];
    kernels[tile.size - 1](position, position + tile.first * plan.channel_pitch, plan.channel_pitch, plan.offsets,
                           inputs + tile.first, packed + tile.weights * plan.weight_lanes);
  }
}

// Rows [first, last) that have a pixel at this step of a wavefront.
struct Wavefront {
  int64_t first, last;

  Wavefront(int64_t step, int64_t skew, int64_t height, int64_t width)
      : first(larger(0, divide_up(step - width + 1, skew))), last(smaller(step / skew + 1, height)) {}
};

// If lanes are channels: computes all pixels of a plane of some images, the first at `corner`.
template <bool kSolve, typename T>
void compute_wavefronts(T* corner, int64_t images, int64_t height, int64_t width, const TaskPlan& plan,
                        const T* packed) {
  const int64_t n = plan.lanes_per_vector, inputs = (plan.tap_count - 1) * plan.channels;
  const int64_t steps = width + plan.skew * (height - 1);
  const int64_t next_row = (plan.row_positions - plan.skew) * plan.position_pitch;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t step = kSolve ? s : steps - 1 - s;
    const Wavefront rows(step, plan.skew, height, width);
    const int64_t count = images * (rows.last - rows.first);
    const int64_t together = divide_up(count, divide_up(count, plan.pixels));
    for (int64_t t = 0; t < plan.tile_count; ++t) {
      const Tile& tile = plan.tiles[kSolve ? t : plan.tile_count - 1 - t];
      const int64_t known = inputs + tile.first, own = smaller(tile.size, plan.channels - tile.first);
      const int64_t at_once = kSolve ? plan.inputs : known;
      int64_t begin = 0;
      do {
        const int64_t end = smaller(known, begin + at_once);
        T* pixels[kMaxPixels];
        int64_t gathered = 0, left = count;
        for (int64_t image = 0; image < images; ++image) {
          T* pixel = corner + image * plan.image_pitch + step * plan.position_pitch + rows.first * next_row;
          for (int64_t row = rows.first; row < rows.last; ++row, pixel += next_row) {
            pixels[gathered++] = pixel;
            --left;
            if (gathered < together && left > 0) continue;
            channels_kernel<kSolve, T>(tile.size / n, gathered)(pixels, tile.first, own, plan.offsets, begin, end,
                                                                known, packed + tile.weights);
            gathered = 0;
          }
        }
        begin = end;
      } while (begin < known);
    }
  }
}

template <typename T>
void clear_borders(const TaskPlan& plan, int64_t images, T* buffer) {
  if (plan.lanes == Lanes::rows) {
    __builtin_memset(buffer, 0, plan.buffer_size * sizeof(T));
    return;
  }
  const int64_t row = plan.row_positions * plan.position_pitch, above = plan.rows_above * row;
  const int64_t left = plan.halo_positions * plan.position_pitch;
  for (int64_t image = 0; image < (plan.lanes == Lanes::channels ? images : 1); ++image) {
    const T* const end = buffer + plan.image_pitch;
    __builtin_memset(buffer, 0, plan.first_plane * sizeof(T));
    for (buffer += plan.first_plane; buffer < end; buffer += plan.plane_pitch) {
      __builtin_memset(buffer, 0, above * sizeof(T));
      for (int64_t to = above; to < plan.plane_pitch; to += row) __builtin_memset(buffer + to, 0, left * sizeof(T));
    }
  }
}

// Moves rows that the previous strip left in the buffer to their place in this strip: in a solution, its last rows, now
// solved, to above this strip; in a convolution, the rows above it to the end of this strip.
template <bool kSolve, typename T>
void keep_shared_rows(const TaskPlan& plan, T* buffer) {
  const int64_t row = plan.row_positions * plan.position_pitch, rows = plan.rows_above * row * sizeof(T);
  for (int64_t plane = plan.first_plane; plane < plan.image_pitch; plane += plan.plane_pitch) {
    T *above = buffer + plane, *last = above + plan.strip_rows * row;
    __builtin_memcpy(kSolve ? above : last, kSolve ? last : above, rows);
  }
}

// If lanes are rows: leaves zeros in lanes without a pixel. Taps to the right would find other values there, and values
// computed from one another shrink to denormal numbers, which are slow.
template <typename T>
void clear_outside(T* position, const TaskPlan& plan, Wavefront rows) {
  const T first = T(rows.first), last = T(rows.last);
  Vector<T> lanes;
  for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = T(lane);
  for (int64_t channel = 0; channel < plan.channels; ++channel, position += plan.channel_pitch)
    store(position, (lanes >= first) & (lanes < last) ? load(position) : Vector<T>{});
}

// A convolution goes through strips, positions and channels in the reverse order of a solution, so each output replaces
// an input that no later output reads.
template <bool kSolve, typename T>
void run_task(const KernelProblem<T>& problem, const TaskPlan& plan, const T* packed, int64_t group, int64_t block,
              T* buffer, int64_t* places) {
  const int64_t stencil = problem.transpose ? opposite(problem.stencils[group]) : problem.stencils[group];
  const int64_t first_image = block * plan.block_images;
  const int64_t images = smaller(plan.block_images, problem.batch - first_image);
  const int64_t first_channel = group * plan.channels;
  const T* input =
      problem.input + first_image * problem.input_strides.batch + first_channel * problem.input_strides.channel;
  T* output =
      problem.output + first_image * problem.output_strides.batch + first_channel * problem.output_strides.channel;
  const T* bias = problem.bias
                      ? problem.bias + (problem.images_differ ? first_image * problem.channels : 0) + first_channel
                      : nullptr;
  const Strip<T> strip{problem,
                       plan,
                       (stencil & kMirrorsPlanes) != 0,
                       (stencil & kMirrorsRows) != 0,
                       (stencil & kMirrorsColumns) != 0,
                       problem.stores_columns(),
                       images,
                       bias,
                       buffer,
                       places};

  const int64_t vectors = divide_up(images, plan.lanes_per_vector);
  TileKernel<T> kernels[kMaxTile];
  for (int64_t size = 1; size <= kMaxTile; ++size)
    kernels[size - 1] = tile_kernel<kSolve, T>(size, vectors, plan.weight_lanes > 1);

  const int64_t strips = divide_up(problem.height, plan.strip_rows);
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t top = (kSolve ? s : strips - 1 - s) * plan.strip_rows;
    const int64_t bottom = smaller(top + plan.strip_rows, problem.height);
    const int64_t halo_top = larger(0, top - plan.rows_above);
    const bool shared = s > 0 && plan.lanes == Lanes::images;
    if (shared) keep_shared_rows<kSolve>(plan, buffer);
    if (!shared || !kSolve) clear_borders(plan, images, buffer);
    if constexpr (kSolve) {
      if (!shared && halo_top < top) {
        strip.place(halo_top, top, top);
        strip.template move<true, false>(const_cast<const T*>(output), problem.output_strides, halo_top, top);
      }
      strip.place(top, bottom, top);
      strip.template move<true, true>(input, problem.input_strides, top, bottom);
    } else {
      const int64_t end = shared ? bottom - plan.rows_above : bottom;
      strip.place(halo_top, end, top);
      strip.template move<true, false>(input, problem.input_strides, halo_top, end);
      strip.place(top, bottom, top);
    }

    const int64_t lines = plan.lanes == Lanes::images ? bottom - top : plan.lanes == Lanes::rows ? 1 : 0;
    const int64_t steps = plan.lanes == Lanes::rows ? problem.width + plan.skew * (bottom - top - 1) : problem.width;
    // Before the end of the first row, lanes without a pixel find only zeros, unless one of these holds.
    const bool outside = plan.lanes == Lanes::rows && (plan.right > 0 || bottom - top < plan.lanes_per_vector);
    for (int64_t z = 0; z < problem.depth; ++z) {
      T* first = buffer + plan.first_pixel + (kSolve ? z : problem.depth - 1 - z) * plan.plane_pitch;
      if (plan.lanes == Lanes::channels)
        compute_wavefronts<kSolve>(first, images, bottom - top, problem.width, plan, packed);
      for (int64_t i = 0; i < lines; ++i) {
        T* line = first + (kSolve ? i : lines - 1 - i) * plan.row_positions * plan.position_pitch;
        for (int64_t j = 0; j < steps; ++j) {
          T* position = line + (kSolve ? j : steps - 1 - j) * plan.position_pitch;
          compute_position<kSolve>(position, plan, packed, kernels);
          if (kSolve && (outside || (plan.lanes == Lanes::rows && j >= problem.width)))
            clear_outside(position, plan, Wavefront(j, plan.skew, bottom - top, problem.width));
        }
      }
    }
    strip.template move<false, !kSolve>(output, problem.output_strides, top, bottom);
  }
}

template <typename T>
void run_either_task(const KernelProblem<T>& problem, const TaskPlan& plan, const T* packed, int64_t group,
                     int64_t block, T* buffer, int64_t* places) {
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
