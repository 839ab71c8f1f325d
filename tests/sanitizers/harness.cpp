// Runs the CPU kernel on random problems without torch, under sanitizers and valgrind:
// `harness FIRST LAST THREADS SET...`.
//
// Each seed is a problem in memory of exactly its size, with any strides, run with each instruction set. Results are
// compared with the formula in nflows_kconv/backends/reference.py, solutions by their residual. No arithmetic may
// overflow, underflow or be invalid, not even that of lanes without a pixel, because denormal numbers are slow.
#include <algorithm>
#include <array>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/problem.h"

// For the formula and what it calls, which are slow enough without instrumentation.
#define UNCHECKED __attribute__((no_sanitize("address", "thread", "undefined")))

namespace {

using Random = std::mt19937_64;
using Sizes = std::array<int64_t, 5>;  // of images, channels, planes, rows and columns

int64_t draw(Random& random, std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; }

// Strides of a tensor of these sizes: the dimensions in any order, with gaps or without.
kconv::Strides draw_strides(Random& random, const Sizes& sizes, bool overlapping) {
  std::array<int, 5> order{0, 1, 2, 3, 4};
  if (random() % 2) std::shuffle(order.begin(), order.end(), random);
  Sizes strides;
  int64_t next = 1 + (random() % 4 == 0);
  for (int i = 4; i >= 0; --i) {
    strides[order[i]] = overlapping && random() % 2 ? 0 : next;
    next = next * std::max<int64_t>(sizes[order[i]], 1) + (random() % 4 == 0 ? random() % 3 : 0);
  }
  return {strides[2], strides[0], strides[1], strides[3], strides[4]};
}

int64_t span(const Sizes& sizes, const kconv::Strides& strides) {
  return 1 + (sizes[0] - 1) * strides.batch + (sizes[1] - 1) * strides.channel + (sizes[2] - 1) * strides.plane +
         (sizes[3] - 1) * strides.row + (sizes[4] - 1) * strides.column;
}

template <typename T>
UNCHECKED T at(const T* tensor, const kconv::Strides& strides, int64_t b, int64_t c, int64_t d, int64_t h, int64_t w) {
  return tensor[b * strides.batch + c * strides.channel + d * strides.plane + h * strides.row + w * strides.column];
}

// Splits work as a thread pool does, into chunks of at least the grain, with one thread each.
int64_t thread_count = 1;
std::vector<const char*> instruction_sets;

using Body = void (*)(int64_t, int64_t, void*);

void run_chunk(int64_t begin, int64_t end, Body body, void* context) {
  std::feclearexcept(FE_ALL_EXCEPT);
  body(begin, end, context);
  if (const int raised = std::fetestexcept(FE_OVERFLOW | FE_UNDERFLOW | FE_INVALID)) {
    std::fprintf(stderr, "%s: floating-point exceptions %#x\n", kconv::instruction_set(), raised);
    std::exit(1);
  }
}

void parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  const int64_t chunks = std::min(thread_count, (count + grain - 1) / grain);
  if (chunks <= 1) return run_chunk(0, count, body, context);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < chunks; ++i)
    threads.emplace_back(run_chunk, i * count / chunks, (i + 1) * count / chunks, body, context);
  for (std::thread& thread : threads) thread.join();
}

struct Tap {
  int64_t row, column, rows, columns;  // the last two are the size of the kernel
};

// A tap in the canonical frame of nflows_kconv/stencil.py.
UNCHECKED Tap canonical(int64_t stencil, int64_t rows, int64_t columns, int64_t r, int64_t c) {
  if (stencil & 16) std::swap(rows, columns), std::swap(r, c);
  return {stencil & 2 ? rows - 1 - r : r, stencil & 1 ? columns - 1 - c : c, rows, columns};
}

UNCHECKED int64_t pivot_column(int64_t stencil, int64_t columns) {
  return stencil & 8 ? (columns - 1) / 2 : columns - 1;
}

UNCHECKED bool is_masked(int64_t stencil, int64_t rows, int64_t columns, int64_t r, int64_t c) {
  const auto [row, column, canonical_rows, canonical_columns] = canonical(stencil, rows, columns, r, c);
  return row == canonical_rows - 1 && column > pivot_column(stencil, canonical_columns);
}

UNCHECKED Tap pivot(int64_t stencil, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const auto [row, column, canonical_rows, canonical_columns] = canonical(stencil, rows, columns, r, c);
      if (row == canonical_rows - 1 && column == pivot_column(stencil, canonical_columns)) return {r, c, rows, columns};
    }
  std::abort();
}

// Returns an entry of y = A x, or A^T x, and of |A| |x|.
template <typename T>
UNCHECKED std::array<double, 2> product(const kconv::KernelProblem<T>& problem, const T* x,
                                        const kconv::Strides& strides, int64_t b, int64_t channel, int64_t d, int64_t h,
                                        int64_t w) {
  const int64_t channels = problem.group_channels(), group = channel / channels, o = channel % channels;
  const int64_t planes = problem.kernel_depth, rows = problem.kernel_height, columns = problem.kernel_width;
  const int64_t stencil = problem.stencils[group];
  const auto [pivot_row, pivot_column, kernel_rows, kernel_columns] = pivot(stencil, rows, columns);
  const int64_t pivot_plane = stencil & 4 ? 0 : planes - 1;
  double sum = 0, magnitude = 0;
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t p = 0; p < planes; ++p)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t sign = problem.transpose ? -1 : 1, output = problem.transpose ? i : o;
          const int64_t input = problem.transpose ? o : i;
          const int64_t from_plane = d + sign * (p - pivot_plane) * problem.dilation.planes;
          const int64_t from_row = h + sign * (r - pivot_row) * problem.dilation.rows;
          const int64_t from_column = w + sign * (c - pivot_column) * problem.dilation.columns;
          if (from_plane < 0 || from_plane >= problem.depth) continue;
          if (from_row < 0 || from_row >= problem.height || from_column < 0 || from_column >= problem.width) continue;
          if (p == pivot_plane && r == pivot_row && c == pivot_column && input > output) continue;
          if (is_masked(stencil, rows, columns, r, c)) continue;
          const int64_t matrix = (group * channels + output) * channels + input;
          const double weight = problem.weight[((matrix * planes + p) * rows + r) * columns + c];
          const double value = at(x, strides, b, group * channels + i, from_plane, from_row, from_column);
          sum += weight * value;
          magnitude += std::abs(weight * value);
        }
  return {sum, magnitude};
}

template <typename T>
void check(const kconv::KernelProblem<T>& problem, const T* input, const T* output, uint64_t seed) {
  const double roundings = 4.0 * (problem.group_channels() * problem.kernel_taps() + 8);
  for (int64_t b = 0; b < problem.batch; ++b)
    for (int64_t c = 0; c < problem.channels; ++c)
      for (int64_t pixel = 0; pixel < problem.depth * problem.height * problem.width; ++pixel) {
        const int64_t w = pixel % problem.width, h = pixel / problem.width % problem.height;
        const int64_t d = pixel / problem.width / problem.height;
        const T* x = problem.solve ? output : input;
        const T* y = problem.solve ? input : output;
        const kconv::Strides& x_strides = problem.solve ? problem.output_strides : problem.input_strides;
        const kconv::Strides& y_strides = problem.solve ? problem.input_strides : problem.output_strides;
        const auto [expected, magnitude] = product(problem, x, x_strides, b, c, d, h, w);
        const double value = at(y, y_strides, b, c, d, h, w), bias = problem.bias ? double(problem.bias[c]) : 0;
        const double got = value - bias;
        const double scale = magnitude + std::abs(value) + std::abs(bias);
        const double tolerance = roundings * std::numeric_limits<T>::epsilon() * scale;
        if (!(std::abs(got - expected) <= tolerance)) {
          std::fprintf(stderr, "seed %llu, %s: got %g, expected %g at (%ld, %ld, %ld, %ld, %ld)\n",
                       (unsigned long long)seed, kconv::instruction_set(), got, expected, long(b), long(c), long(d),
                       long(h), long(w));
          std::exit(1);
        }
      }
}

template <typename T>
void run(uint64_t seed) {
  Random random(seed);
  std::normal_distribution<double> normal;
  const bool large = random() % 200 == 0;  // several strips of rows, if lanes are images
  const int64_t groups = large ? 1 : draw(random, {1, 1, 2, 3, 4});
  const int64_t per_group = large ? 1 : draw(random, {1, 2, 3, 4, 5, 7, 13});
  const bool volume = random() % 3 == 0;
  const int64_t planes = volume ? draw(random, {1, 2, 3}) : 1;
  const int64_t rows = draw(random, {1, 2, 3, 4, 9}), columns = draw(random, {1, 2, 3, 5, 9});
  Sizes sizes{draw(random, {1, 1, 2, 3, 5, 9, 17, 33, 70}), groups * per_group, volume ? draw(random, {1, 2, 3, 5}) : 1,
              draw(random, {1, 1, 2, 3, 5, 8, 17, 40}), draw(random, {1, 1, 2, 3, 5, 8, 17, 40})};
  if (large) sizes = {17, 1, volume ? 2 : 1, 95, 95};
  while (!large && sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4] > 1500)
    for (int64_t i : {0, 2, 3, 4}) sizes[i] = (sizes[i] + 1) / 2;

  const kconv::Strides input_strides = draw_strides(random, sizes, random() % 4 == 0);
  const kconv::Strides output_strides = draw_strides(random, sizes, false);
  // Of exactly this size, so a sanitizer detects any access beyond it.
  const std::unique_ptr<T[]> input(new T[span(sizes, input_strides)]),
      weight(new T[sizes[1] * per_group * planes * rows * columns]);
  std::generate_n(input.get(), span(sizes, input_strides), [&] { return T(normal(random)); });
  // Tiny weights would make lanes without a pixel underflow if each computed from the last.
  const double scale = (random() % 4 ? 0.5 : 1e-13) / std::sqrt(per_group * planes * rows * columns);
  std::generate_n(weight.get(), sizes[1] * per_group * planes * rows * columns,
                  [&] { return T(scale * normal(random)); });
  const std::unique_ptr<int64_t[]> stencils(new int64_t[groups]);
  std::generate_n(stencils.get(), groups,
                  [&] { return volume ? int64_t(random() % 8) : draw(random, {0, 1, 2, 3, 8, 11, 24, 27}); });
  for (int64_t channel = 0; channel < sizes[1]; ++channel) {
    const int64_t stencil = stencils[channel / per_group], plane = stencil & 4 ? 0 : planes - 1;
    const auto [row, column, kernel_rows, kernel_columns] = pivot(stencil, rows, columns);
    weight[(((channel * per_group + channel % per_group) * planes + plane) * rows + row) * columns + column] =
        T(random() % 2 ? 1.25 : -0.75);
  }
  const auto draw_step = [&] { return draw(random, {1, 1, 2, 3, 20}); };
  const kconv::Lag dilation{volume ? draw_step() : 1, draw_step(), draw_step()};
  const bool transpose = random() % 2, solve = random() % 2;
  const std::unique_ptr<T[]> bias(random() % 2 ? new T[sizes[1]] : nullptr);
  if (bias) std::generate_n(bias.get(), sizes[1], [&] { return T(normal(random)); });
  for (const char* name : instruction_sets) {
    if (!kconv::select_instruction_set(name)) std::abort();
    const std::unique_ptr<T[]> output(new T[span(sizes, output_strides)]);
    const kconv::KernelProblem<T> problem{
        input.get(), output.get(), weight.get(), bias.get(), nullptr,  stencils.get(), input_strides, output_strides,
        sizes[2],    sizes[0],     sizes[1],     sizes[3],   sizes[4], groups,         planes,        rows,
        columns,     dilation,     false,        transpose,  solve,    false};
    if (kconv::run(problem, thread_count, parallel_for) != kconv::Outcome::done) std::abort();
    check(problem, input.get(), output.get(), seed);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t first = std::strtoull(arguments[1], nullptr, 10), last = std::strtoull(arguments[2], nullptr, 10);
  thread_count = std::atol(arguments[3]);
  instruction_sets.assign(arguments + 4, arguments + count);
  for (uint64_t seed = first; seed < last; ++seed) seed % 2 ? run<float>(seed) : run<double>(seed);
  std::printf("%llu problems\n", (unsigned long long)(last - first));
}
