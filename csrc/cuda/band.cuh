// A band of rows in shared memory, the common part of the two wavefront solvers.
//
// A thread block solves one band, ROWS rows of one image and group, one wavefront per step. Pixel (row, column) is
// solved at time kLead + TAU row + column, and pixel (row, time) is at row kRowSize + time PITCH of
//
//     solved   x; the kHalo rows before the first are the last ones of the band above, zero without one
//     given    y
//
// Without chunks these are whole lines of LINE pixels, LINE = kRowSize / PITCH + TAU, with kGap columns of zeros
// between them: a time is a column for each row. With chunks a line has kHistory + STEPS times: the last kHistory times
// of x stay when the next STEPS follow, y is copied one chunk ahead, and no size is proportional to the image. Channels
// are contiguous and padded to an odd number of 16-byte vectors, and kRowSize / PITCH is odd, so 16-byte reads of
// neighbouring rows at one time fall into different banks.
//
// Bands of one image run concurrently, each a little behind the one above: a band publishes how many columns of its
// last rows it has written to the scratch, and the band below waits for them. Blocks take their bands by ticket, so a
// block only waits for blocks that already run.
//
// Constants in addition to those of arguments.cuh:
//   GROUPS        of the image; arguments.groups if they are many
//   ROWS, STEPS   of a band and of a chunk; with several chunks STEPS >= kHistory
//   CHUNKED       1 if there may be several chunks
//   BANDED        1 if there are several bands; then ROWS >= kHalo, and CHUNKED
//   THREADS       in a block
//   BIAS          1 if there is one to take off y
//   PITCH         values of a pixel in shared memory
//   LINE, GIVEN_LINE   pixels from a row to the next, in x and in y, at a time with chunks, else at a column
//   SOLVED, GIVEN      pixels of x and of a chunk of y
//   STRETCH       steps that may be solved at once, some of them after the last pixel
//   PLACE_BYTES, BAND_BYTES   of shared memory, for the Place and for all
// Arguments: offsets[0] = int counters: the ticket, then one of each band;
// offsets[1] = the last kHalo rows of every band, [band][kHalo][CHANNELS][width].
#pragma once

#include "arguments.cuh"

constexpr int kHalo = KERNEL_H - 1;
constexpr int kLeft = KERNEL_W - 1 - kRight;
constexpr int kHistory = TAU * kHalo + kLeft;
// Steps before the first row's first pixel, for what this pixel reads to the right in the band above.
constexpr int kLead = BANDED ? kRight : 0;
constexpr int kVector = 16 / int(sizeof(Accumulator));
constexpr int kVectors = ceil_div(CHANNELS, kVector);
constexpr int kGivenBuffers = CHUNKED ? 2 : 1;
constexpr int kWidth = STEPS - TAU * (ROWS - 1);  // of the image, without chunks
constexpr int kGap = CHUNKED ? 0 : LINE - kWidth;
constexpr int kRowSize = (CHUNKED ? LINE : LINE - TAU) * PITCH;
constexpr int kBefore = CHUNKED ? kHistory : kGap + TAU * kHalo;  // pixels of a line of x before time 0
constexpr int kSolvedSize = SOLVED * PITCH, kGivenSize = GIVEN * PITCH;
constexpr int kGivenRowSize = (CHUNKED ? GIVEN_LINE : GIVEN_LINE - TAU) * PITCH;

// The band of this block.
struct Place {
  int work;   // its number among all bands
  int index;  // among the bands of its image
  int image, group;
};
static_assert(sizeof(Place) <= PLACE_BYTES, "see the planner");

using PixelVector = Vector<kVector>;

__device__ inline void synchronize() {
  if (THREADS == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

struct Band {
  const Arguments& arguments;
  Accumulator* solved;
  Accumulator* given;
  const Place* taken;
  int rows;  // inside the image

  // Takes BAND_BYTES of shared memory. x is zero outside the image; so are the padded channels and y, for solvers that
  // read them.
  __device__ Band(const Arguments& arguments, char* shared, bool reads_padding) : arguments(arguments) {
    if (BANDED && threadIdx.x == 0) *reinterpret_cast<Place*>(shared) = place_of(atomicAdd(counters(), 1));
    taken = reinterpret_cast<const Place*>(shared);
    solved = reinterpret_cast<Accumulator*>(shared + PLACE_BYTES);
    given = solved + kSolvedSize;
    const int zeros = (kSolvedSize + (reads_padding ? kGivenBuffers * kGivenSize : 0)) / kVector;
    for (int i = threadIdx.x; i < zeros; i += THREADS) reinterpret_cast<PixelVector*>(solved)[i] = {};
    if (BANDED || reads_padding) __syncthreads();
    rows = BANDED ? min(ROWS, arguments.height - place().index * ROWS) : ROWS;
  }

  // With bands, read from shared memory each time: values derived from it would take registers from the weights.
  __device__ Place place() const { return BANDED ? *taken : place_of(blockIdx.x); }

  // Returns the offset of pixel (row, time); row counts from -kHalo, time from -kHistory within the chunk.
  __device__ Accumulator* solved_at(int row, int time) const {
    return solved + (row + kHalo) * kRowSize + (time + kBefore) * PITCH;
  }
  __device__ Accumulator* given_at(int chunk, int row, int time) const {
    return given + chunk % kGivenBuffers * kGivenSize + row * kGivenRowSize + time * PITCH;
  }

  // Starts copying a chunk of y.
  __device__ void fetch(int chunk) const {
    for_each_value<GIVEN_LINE>(given_at(chunk, 0, 0), input(), chunk,
                               [](Accumulator* to, const SCALAR* from, int) { copy_to_shared(to, from); });
  }

  // Subtracts the bias from a chunk of y that has arrived. A thread handles the values it copied, so no barrier is
  // needed.
  __device__ void subtract_bias(int chunk) const {
    for_each_value<GIVEN_LINE>(
        given_at(chunk, 0, 0), input(), chunk,
        [&](Accumulator* value, const SCALAR*, int channel) { *value -= bias_of(arguments, place().group, channel); });
  }

  // Waits for the band above, then copies the part of its last rows that this chunk reads.
  __device__ void fetch_halo(int chunk) const {
    if (place().index == 0) return;
    const int above = place().work - arguments.batch * GROUPS;
    constexpr int before = TAU * kHalo - kLead;  // times from column 0 of the first row to time 0
    const int needed = min(arguments.width, (chunk + 1) * STEPS + before);
    if (threadIdx.x == 0) {
      const int* columns = counters() + 1 + above;
      while (load_relaxed(columns) < needed) {
      }
      load_acquire(columns);
    }
    __syncthreads();
    for_each_of_last_rows<before>(above, -kHalo, chunk, [](Accumulator* to, const Accumulator* from, bool inside) {
      if (inside || kRight) *to = inside ? *from : 0;
    });
  }

  // Publishes a chunk of the last rows for the band below.
  __device__ void publish(int chunk) const {
    for_each_of_last_rows<0>(place().work, ROWS - kHalo, chunk,
                             [](const Accumulator* from, Accumulator* to, bool inside) {
                               if (inside) *to = *from;
                             });
    __syncthreads();
    const int columns = min(arguments.width, (chunk + 1) * STEPS - TAU * (ROWS - 1) - kLead);
    if (threadIdx.x < 32)
      store_release(counters() + 1 + place().work, columns);  // by a whole warp, to avoid divergence
  }

  // Writes a chunk of x.
  __device__ void write(int chunk) const {
    for_each_value<LINE>(solved_at(0, 0), output(), chunk,
                         [](const Accumulator* from, SCALAR* to, int) { store(to, *from); });
  }

  // Moves the last times of x to where the next chunk reads them.
  __device__ void keep_history() const {
    // Not hoisted, as in for_each_of_last_rows.
    for (int i = not_hoisted(threadIdx.x); i < (kHalo + ROWS) * kVectors; i += THREADS) {
      PixelVector* line = reinterpret_cast<PixelVector*>(solved + i / kVectors * kRowSize) + i % kVectors;
#pragma unroll
      for (int time = 0; time < kHistory; ++time) {
        line[time * PITCH / kVector] = line[(STEPS + time) * PITCH / kVector];
      }
    }
  }

  // Solves the band. solve(chunk, steps) must solve the times [0, steps) of a chunk and end with a barrier. The first
  // chunk of y must have been fetched.
  template <typename Solve>
  __device__ void run(Solve&& solve) const {
    const int times = CHUNKED ? kLead + TAU * (rows - 1) + arguments.width : STEPS;
    for (int chunk = 0; chunk * STEPS < times; ++chunk) {
      const bool last = (chunk + 1) * STEPS >= times;
      wait_for_copies();
      if (BIAS) subtract_bias(chunk);
      synchronize();
      if (BANDED) {
        fetch_halo(chunk);
        __syncthreads();
      }
      if (!last) fetch(chunk + 1);
      solve(chunk, min(STEPS, times - chunk * STEPS));
      if (BANDED) publish(chunk);
      write(chunk);
      if (!last) keep_history();
    }
  }

 private:
  __device__ Place place_of(int work) const {
    const int problems = arguments.batch * GROUPS, problem = BANDED ? work % problems : work;
    return {work, BANDED ? work / problems : 0, problem / GROUPS, problem % GROUPS};
  }

  // Calls move(value in shared memory, value in the image, channel) for every value of a chunk. A thread walks down the
  // band at one time, or one column without chunks; neighbouring threads have neighbouring times.
  template <int SPACING, typename T, typename Move>
  __device__ void for_each_value(Accumulator* pixels, const ImageView<T>& view, int chunk, Move&& move) const {
    constexpr int span = CHUNKED ? STEPS : kWidth, slope = CHUNKED ? TAU : 0;
    // Enough threads share the channels of a pixel to leave none idle.
    constexpr int shares = THREADS >= span * kVectors ? kVectors : 1, each = ceil_div(CHANNELS, shares);
    constexpr int rows_at_once = THREADS >= span * shares ? THREADS / (span * shares) : 1;
    const int share = threadIdx.x / span % shares, own_row = threadIdx.x / (span * shares);
    const int first_channel = share * each;
    if (own_row >= rows_at_once) return;
    // Rows of the image with a pixel in the chunk.
    const int first = CHUNKED ? max(0, (chunk * STEPS - kLead - arguments.width + TAU) / TAU) : 0;
    const int last = CHUNKED ? min(rows - 1, ((chunk + 1) * STEPS - 1 - kLead) / TAU) : ROWS - 1;
    const long long down = rows_at_once * (view.row - slope * view.column);
#pragma unroll 1
    for (int at = threadIdx.x % span; at < span; at += THREADS) {
      int row = first + own_row;
      int column = CHUNKED ? chunk * STEPS + at - kLead - slope * row : at;
      Accumulator* pixel = pixels + (row * SPACING + at) * PITCH + first_channel;
      T* value =
          view.data + (place().index * ROWS + row) * view.row + column * view.column + first_channel * view.channel;
#pragma unroll 1
      for (; row <= last; row += rows_at_once) {
        if (!CHUNKED || (unsigned)column < (unsigned)arguments.width) {
          T* next = value;
#pragma unroll
          for (int i = 0; i < each; ++i) {
            if (shares * each == CHANNELS || first_channel + i < CHANNELS) {
              move(pixel + i, next, first_channel + i);
            }
            next += view.channel;
          }
        }
        pixel += rows_at_once * SPACING * PITCH;
        value += down;
        column -= rows_at_once * slope;
      }
    }
  }

  __device__ ImageView<const SCALAR> input() const {
    return image_view(static_cast<const SCALAR*>(arguments.first), arguments.first_strides, arguments, place().image,
                      place().group);
  }
  __device__ ImageView<SCALAR> output() const {
    return image_view(static_cast<SCALAR*>(arguments.output), arguments.output_strides, arguments, place().image,
                      place().group);
  }
  __device__ int* counters() const { return reinterpret_cast<int*>(arguments.scratch + arguments.offsets[0]); }

  // Calls move(value in shared memory, value in the scratch, whether it is in the image) for the last kHalo rows of a
  // band, starting at row `first`, over a chunk and, before the first chunk, over BEFORE times.
  template <int BEFORE, typename Move>
  __device__ void for_each_of_last_rows(int band, int first, int chunk, Move&& move) const {
    Accumulator* last_rows = reinterpret_cast<Accumulator*>(arguments.scratch + arguments.offsets[1]);
    constexpr int times = STEPS + BEFORE;
    // Otherwise the addresses of all rounds are kept from chunk to chunk, and spill.
    for (int i = not_hoisted(threadIdx.x); i < kHalo * CHANNELS * times; i += THREADS) {
      const int time = i % times - BEFORE, line = i / times, channel = line % CHANNELS, row = line / CHANNELS;
      const int column = chunk * STEPS + time - TAU * (first + row) - kLead;
      Accumulator* value = last_rows + ((long long)band * kHalo * CHANNELS + line) * arguments.width + column;
      if (column >= 0 && (chunk == 0 || time >= 0))
        move(solved_at(first + row, time) + channel, value, column < arguments.width);
    }
  }
};
