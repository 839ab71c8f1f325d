// A band of rows on its way through shared memory: what the two wavefront solvers have in common.
//
// A thread block solves one band: ROWS rows of one image and group, one wavefront a step. Shared memory is indexed by
// *time*: pixel (row, s) of the band is solved at time kLead + TAU row + s, so that what a step touches lies in one
// column of
//
//     solved[kHalo + ROWS][kTimes][kPitch]     x; the kHalo rows are the last ones of the band above, zero without one
//     given[kGivenBuffers][ROWS][kTimes][kPitch]   y
//
// which hold STEPS times; the last kHistory times of x stay when the next STEPS come (chunk by chunk, y being copied
// one chunk ahead). Nothing is proportional to the image. Channels are contiguous and padded to an odd number of
// 16-byte vectors, and kTimes is odd: 16-byte reads of neighbouring rows at one time then fall into different banks.
//
// Bands of one image run concurrently, each a little behind the one above: a band publishes how many columns of its
// last rows it has written to the scratch, and the band below waits for that. Blocks take their bands by ticket, so
// that a block only ever waits for one that already runs.
//
// Constants beside those of arguments.cuh:
//   ROWS, STEPS   of a band and of a chunk; with several chunks STEPS >= kHistory
//   CHUNKED       1 if there may be several chunks
//   BANDED        1 if there are several bands; then ROWS >= kHalo
//   THREADS       in a block
//   BIAS          1 if there is one to take off y
// Arguments: offsets[0] = int counters: the ticket, then one of each band;
// offsets[1] = the last kHalo rows of every band, [band][kHalo][CHANNELS][width].
#pragma once

#include "arguments.cuh"

constexpr int kHalo = KERNEL_H - 1;
constexpr int kHistory = TAU * kHalo + KERNEL_W - 1 - kRight;
// Steps before the first row's first pixel, in which it meets what this pixel reads to the right in the band above.
constexpr int kLead = BANDED ? kRight : 0;
constexpr int kTimes = (kHistory + STEPS) | 1;
constexpr int kVector = 16 / int(sizeof(Accumulator));
constexpr int kVectors = ceil_div(CHANNELS, kVector);
constexpr int kPitch = (kVectors | 1) * kVector;
constexpr int kGivenBuffers = CHUNKED ? 2 : 1;
constexpr int kRowSize = kTimes * kPitch;
constexpr int kSolvedSize = (kHalo + ROWS) * kRowSize;
constexpr int kGivenSize = ROWS * kRowSize;
// From a pixel of x to the same pixel of y, in the first buffer.
constexpr int kGivenFromSolved = kSolvedSize - kHalo * kRowSize - kHistory * kPitch;

using PixelVector = Vector<kVector>;

// Which band it is. In shared memory: the registers are for the weights.
struct Place {
  ImageView<const SCALAR> input;
  ImageView<SCALAR> output;
  int work;       // number of the band among all
  int index;      // among those of its image
  int first_row;  // in the image
  int group;
};

constexpr int kBandBytes = sizeof(Place) + (kSolvedSize + kGivenBuffers * kGivenSize) * int(sizeof(Accumulator));

__device__ inline void synchronize() {
  if (THREADS == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

struct Band {
  const Arguments& arguments;
  const Place& place;
  Accumulator* solved;
  Accumulator* given;
  int rows;  // that lie in the image

  // Takes kBandBytes of shared memory. x is zero left of the image and above it, and so are padded channels.
  __device__ Band(const Arguments& arguments, char* shared)
      : arguments(arguments), place(*reinterpret_cast<const Place*>(shared)) {
    solved = reinterpret_cast<Accumulator*>(shared + sizeof(Place));
    given = solved + kSolvedSize;
    if (threadIdx.x == 0) {
      Place& own = *reinterpret_cast<Place*>(shared);
      own.work = BANDED ? atomicAdd(counters(), 1) : blockIdx.x;
      const int problems = arguments.batch * arguments.groups;
      const int problem = own.work % problems, image = problem / arguments.groups;
      own.index = own.work / problems;
      own.first_row = own.index * ROWS;
      own.group = problem % arguments.groups;
      own.input =
          image_view(static_cast<const SCALAR*>(arguments.first), arguments.first_strides, arguments, image, own.group);
      own.output =
          image_view(static_cast<SCALAR*>(arguments.output), arguments.output_strides, arguments, image, own.group);
    }
    const PixelVector zero = {};
    PixelVector* vectors = reinterpret_cast<PixelVector*>(solved);
    for (int i = threadIdx.x; i < (kSolvedSize + kGivenBuffers * kGivenSize) / kVector; i += THREADS) vectors[i] = zero;
    __syncthreads();
    rows = min(ROWS, arguments.height - place.first_row);
  }

  // Where pixel (row, time) lies; row counts from -kHalo, time from -kHistory within the chunk.
  __device__ Accumulator* solved_at(int row, int time) const {
    return solved + (row + kHalo) * kRowSize + (time + kHistory) * kPitch;
  }
  __device__ Accumulator* given_at(int chunk, int row, int time) const {
    return given + (kGivenBuffers == 2 ? chunk % 2 : 0) * kGivenSize + row * kRowSize + time * kPitch;
  }

  // Starts to copy a chunk of y.
  __device__ void fetch(int chunk) const {
    const ImageView<const SCALAR> input = place.input;
    for_each_pixel(chunk, [&](int row, int time, int column, int first_channel) {
      Accumulator* to = given_at(chunk, row, time);
      const SCALAR* from = input.data + (place.first_row + row) * input.row + column * input.column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = first_channel + i;
        if (channel < CHANNELS) copy(to + channel, from + channel * input.channel);
      }
    });
  }

  // Takes the bias off a chunk of y that has arrived. A thread takes it off what it has copied itself, so that no
  // barrier is needed.
  __device__ void subtract_bias(int chunk) const {
    for_each_pixel(chunk, [&](int row, int time, int, int first_channel) {
      Accumulator* values = given_at(chunk, row, time);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = first_channel + i;
        if (channel < CHANNELS) values[channel] -= bias_of(arguments, place.group, channel);
      }
    });
  }

  // Waits for the band above, then copies what this chunk reads of its last rows.
  __device__ void fetch_halo(int chunk) const {
    if (place.index == 0) return;
    const int above = place.work - arguments.batch * arguments.groups;
    constexpr int before = TAU * kHalo - kLead;  // times from column 0 of the first row to time 0
    const int needed = min(arguments.width, (chunk + 1) * STEPS + before);
    if (threadIdx.x == 0) {
      while (load_acquire(counters() + 1 + above) < needed) {
      }
    }
    __syncthreads();
    constexpr int times = STEPS + before;
    for (int i = threadIdx.x; i < kHalo * CHANNELS * times; i += THREADS) {
      const int time = i % times - before, channel = i / times % CHANNELS, row = i / (times * CHANNELS) - kHalo;
      const int column = chunk * STEPS + time - TAU * row - kLead;
      if (column < 0 || (!kRight && column >= arguments.width) || (chunk > 0 && time < 0)) continue;
      const bool inside = !kRight || column < arguments.width;
      solved_at(row, time)[channel] = inside ? *last_rows(above, row + kHalo, channel, column) : 0;
    }
  }

  // Writes a chunk of x, and publishes it for the band below.
  __device__ void write(int chunk) const {
    const ImageView<SCALAR> output = place.output;
    for_each_pixel(chunk, [&](int row, int time, int column, int first_channel) {
      const Accumulator* from = solved_at(row, time);
      SCALAR* to = output.data + (place.first_row + row) * output.row + column * output.column;
      const int halo_row = row - (ROWS - kHalo);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = first_channel + i;
        if (channel >= CHANNELS) continue;
        store(to + channel * output.channel, from[channel]);
        if (BANDED && halo_row >= 0) *last_rows(place.work, halo_row, channel, column) = from[channel];
      }
    });
    if (BANDED) {
      __threadfence();
      __syncthreads();
      const int columns = min(arguments.width, (chunk + 1) * STEPS - TAU * (ROWS - 1) - kLead);
      if (threadIdx.x == 0) store_release(counters() + 1 + place.work, columns);
    }
  }

  // Moves the last times of x to where the next chunk looks for them.
  __device__ void keep_history() const {
    for (int i = threadIdx.x; i < (kHalo + ROWS) * kPitch; i += THREADS) {
      Accumulator* values = solved + i / kPitch * kRowSize + i % kPitch;
      for (int time = 0; time < kHistory; ++time) values[time * kPitch] = values[(STEPS + time) * kPitch];
    }
  }

  // Solves the band: solve(chunk, steps) must solve the times [0, steps) of a chunk, and end with a barrier. The first
  // chunk of y must have been fetched.
  template <typename Solve>
  __device__ void run(Solve&& solve) const {
    const int times = kLead + TAU * (rows - 1) + arguments.width;
    for (int chunk = 0; chunk * STEPS < times; ++chunk) {
      const bool last = !CHUNKED || (chunk + 1) * STEPS >= times;
      wait_for_copies();
      if (BIAS) subtract_bias(chunk);
      synchronize();
      if (BANDED) {
        fetch_halo(chunk);
        __syncthreads();
      }
      if (!last) fetch(chunk + 1);
      solve(chunk, min(STEPS, times - chunk * STEPS));
      write(chunk);
      if (!last) keep_history();
    }
  }

 private:
  // Calls move(row, time, column, first channel) for every pixel of a chunk, four channels at a time, with neighbouring
  // columns on neighbouring threads.
  template <typename Move>
  __device__ void for_each_pixel(int chunk, Move&& move) const {
    // Without chunks the width is known here, and no thread meets a time outside the image.
    constexpr int span = CHUNKED ? STEPS : STEPS - TAU * (ROWS - 1) - kLead;
    constexpr int lines_at_once = THREADS >= span ? THREADS / span : 1;
    const int first_line = THREADS >= span ? threadIdx.x / span : 0;
    const int first = THREADS >= span ? threadIdx.x % span : threadIdx.x;
    if (first_line >= lines_at_once) return;
    for (int line = first_line; line < (CHANNELS + 3) / 4 * ROWS; line += lines_at_once) {
      const int row = line % ROWS, first_channel = line / ROWS * 4;
      if (row >= rows) continue;
      for (int at = first; at < span; at += THREADS) {
        const int from = kLead + TAU * row;  // the time of its first pixel
        const int time = CHUNKED ? at : at + from, column = CHUNKED ? chunk * STEPS + at - from : at;
        if (column >= 0 && column < arguments.width) move(row, time, column, first_channel);
      }
    }
  }
  __device__ static void copy(Accumulator* to, const Accumulator* from) { copy_async(to, from); }
  template <typename T>
  __device__ static void copy(Accumulator* to, const T* from) {
    *to = load(from);
  }
  __device__ int* counters() const { return reinterpret_cast<int*>(arguments.scratch + arguments.offsets[0]); }
  __device__ Accumulator* last_rows(int band, int row, int channel, int column) const {
    Accumulator* rows_of_bands = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[1]);
    return rows_of_bands + (((long long)band * kHalo + row) * CHANNELS + channel) * arguments.width + column;
  }
};
