// Divides a problem into tasks, and lays out the pixels and weights of a task in memory.
//
// Every group is in the canonical frame of its family (see stencil.h), with reversed channels for A^T. Each output then
// depends only on earlier pixels, in raster order, and smaller channels. A task works in a buffer of positions, and one
// inner kernel computes vectors of lanes. Lanes are
//
//   images:   position = pixel (raster order), lane = image of the batch;
//   rows:     position = skew * row + column of a band of rows, lane = row (its first lanes repeat the rows above);
//   channels: position = pixel of some images, lane = output channel; the pixels of a wavefront are computed together.
//
// With images or rows as lanes, a position holds [channels][lanes], and one step computes all channels of a position
// for all lanes. (skew, 1) is the schedule of nflows_kconv/stencil.py: pixels with equal skew * row + column form a
// wavefront. A volume is a sequence of planes, each laid out as an image, after planes of zeros. In all three layouts a
// tap of the kernel is a fixed offset. Borders are positions that hold 0; the border to the right of a row is the
// border to the left of the next, unless lanes are rows. A strip is a range of rows in all planes of a volume; no tap
// reads rows below it.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace kconv {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The inner kernel holds at most this many output channels for this many vectors of lanes in registers.
constexpr int kMaxTile = 6;
constexpr int kMaxVectors = 4;
// If lanes are channels: at most this many vectors of channels for this many pixels.
constexpr int kMaxChannelVectors = 3;
constexpr int kMaxPixels = 8;

// Packed weights or vector operations that are worth waking a thread.
constexpr int64_t kGrain = 16384;

enum class Lanes { images, rows, channels };

struct Target {  // properties of an instruction set
  int vector_bytes;
  int registers;    // vector registers
  int max_vectors;  // of lanes, most that a position should hold
};

struct Tile {  // output channels [first, first + size) and their packed weights
  int64_t first, size, weights;
};

struct TaskPlan {
  Lanes lanes;
  int64_t channels;                                // per group
  int64_t planes_before, rows_above, left, right;  // how far taps reach, clipped to the image
  int64_t skew;
  int64_t vectors;  // of lanes per position, at most
  int64_t pixels;   // if lanes are channels: computed together, at most
  int64_t inputs;   // if lanes are channels: inputs that all pixels of a wavefront add before the next inputs, at most
  int64_t block_images;  // images per task, at most
  int64_t lanes_per_vector;
  int64_t halo_lanes;      // lanes before the computed ones
  int64_t halo_positions;  // positions before the first pixel of a row, unless lanes are rows
  int64_t channel_pitch;   // elements from a channel to the next
  int64_t position_pitch;  // elements from a position to the next
  int64_t row_positions;   // positions from a row to the next, unless lanes are rows
  int64_t plane_pitch;     // elements from a plane to the next
  int64_t image_pitch;     // elements of the planes of an image, or of a block unless lanes are channels
  int64_t first_plane;     // elements before the first plane
  int64_t first_pixel;     // elements before the first pixel of a strip
  int64_t strip_rows;      // rows in the buffer, without the rows above that they read
  int64_t blocks;          // tasks per group
  int64_t buffer_size;     // elements
  int64_t operations;      // vector operations per task
  int64_t group_weights;   // packed elements per group, for each of
  int64_t weight_lanes;    // lanes with their own weights, in
  int64_t weight_blocks;   // blocks
  int64_t tile_count;
  const Tile* tiles;
  int64_t tap_count;
  const Lag* taps;         // taps that can reach into the image, the pivot last
  const int64_t* offsets;  // of a pixel's inputs: each channel at each tap
  // If lanes are channels: for each mirror image of the stencil, the index in `taps` of each tap of the kernel, or -1.
  const int64_t* places;
};

struct OwnedTaskPlan : TaskPlan {
  std::vector<Tile> owned_tiles;
  std::vector<Lag> owned_taps;
  std::vector<int64_t> owned_offsets, owned_places;
};

// Returns the plan for `groups` groups of a family; the problem is in the family's frame.
template <typename T>
OwnedTaskPlan make_plan(const KernelProblem<T>& problem, int64_t family, int64_t groups, const Target& target,
                        int64_t threads);

}  // namespace kconv
