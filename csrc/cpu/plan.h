// How a problem is cut into tasks, and how the pixels and weights of a task lie in memory.
//
// Every group is in the canonical frame of its family (see stencil.h), and for A^T its channels are reversed, so that
// each output depends on earlier pixels, in raster order, and smaller channels alone. A task works in a buffer of
// positions, and one inner kernel computes vectors of lanes. Lanes are
//
//   images:   position = pixel (raster order), lane = image of the batch;
//   rows:     position = skew * row + column of a band of rows, lane = row (its first lanes repeat the rows above);
//   channels: position = pixel of some images, lane = output channel; the pixels of a wavefront are computed together.
//
// With images or rows a position holds [channels][lanes], and one step computes all channels of a position for all
// lanes at once. (skew, 1) is the schedule of nflows_kconv/stencil.py: pixels with equal skew * row + column are a
// wavefront. A volume is its planes one after the other, each as an image is, behind planes of 0. In all three a tap of
// the kernel is one fixed offset. Borders are positions that hold 0; those to the right of a row are those to the left
// of the next, except where lanes are rows. A strip is some rows, of all planes of a volume: no tap reads
// rows below it.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace kconv {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the inner kernel holds in registers, at most: the sums of so many output channels, for so many vectors of lanes.
constexpr int kMaxTile = 6;
constexpr int kMaxVectors = 4;
// And where lanes are channels: so many vectors of them, for so many pixels.
constexpr int kMaxChannelVectors = 3;
constexpr int kMaxPixels = 8;

enum class Lanes { images, rows, channels };

struct Target {  // what an instruction set offers
  int vector_bytes;
  int registers;    // of a vector each
  int max_vectors;  // of lanes that a position should hold
};

struct Tile {  // output channels [first, first + size) and their packed weights
  int64_t first, size, weights;
};

struct TaskPlan {
  Lanes lanes;
  int64_t channels;                                // of a group
  int64_t planes_before, rows_above, left, right;  // how far taps reach, clipped to the image
  int64_t skew;
  int64_t vectors;       // of lanes in a position, at most
  int64_t pixels;        // lanes are channels: computed together, at most
  int64_t inputs;        // lanes are channels: whose weights all pixels of a wavefront use before the next, at most
  int64_t block_images;  // of a task, at most
  int64_t lanes_per_vector;
  int64_t halo_lanes;      // lanes before those that are computed
  int64_t halo_positions;  // before the first pixel of a row, unless lanes are rows
  int64_t channel_pitch;   // elements from a channel to the next
  int64_t position_pitch;  // elements from a position to the next
  int64_t row_positions;   // from a row to the next, unless lanes are rows
  int64_t plane_pitch;     // elements from a plane to the next
  int64_t image_pitch;     // elements of the planes of an image, or of a block unless lanes are channels
  int64_t first_plane;     // elements before the first plane
  int64_t first_pixel;     // elements before the first pixel of a strip
  int64_t strip_rows;      // rows that the buffer holds at once, without those above that they read
  int64_t blocks;          // tasks of each group
  int64_t buffer_size;     // elements
  int64_t operations;      // vector operations of a task
  int64_t group_weights;   // packed elements of a group, for each of
  int64_t weight_lanes;    // lanes with weights of their own, in
  int64_t weight_blocks;   // blocks
  int64_t tile_count;
  const Tile* tiles;
  int64_t tap_count;
  const Lag* taps;         // that can reach into the image, the pivot last
  const int64_t* offsets;  // of the inputs of a pixel: each channel at each tap
  // Lanes are channels, for each mirror image of the stencil: where each tap of a kernel is in `taps`, or -1.
  const int64_t* places;
};

struct OwnedTaskPlan : TaskPlan {
  std::vector<Tile> owned_tiles;
  std::vector<Lag> owned_taps;
  std::vector<int64_t> owned_offsets, owned_places;
};

// For so many groups of a family; the problem is in the family's frame.
template <typename T>
OwnedTaskPlan make_plan(const KernelProblem<T>& problem, int64_t family, int64_t groups, const Target& target,
                        int64_t threads);

}  // namespace kconv
