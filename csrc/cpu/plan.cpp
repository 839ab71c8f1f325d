#include "plan.h"

#include <algorithm>

namespace kconv {
namespace {

// Largest buffer, in bytes, that leaves room for weights in a second-level cache, and vice versa.
constexpr int64_t kBufferBytes = 512 * 1024;
// Bytes of weights to use at a time, which stay in that cache even if there are more.
constexpr int64_t kInputBytes = 256 * 1024;
constexpr int64_t kFirstLevelBytes = 32 * 1024;

// Returns tiles of whole units of channels, as equal as possible, so none runs with few accumulators. Each channel of a
// tile has weights for every channel at each tap, for the channels up to the tile's last at the pivot, and `more`.
std::vector<Tile> make_tiles(int64_t channels, int64_t unit, int64_t taps, int64_t more, int64_t largest) {
  const int64_t units = divide_up(channels, unit), count = divide_up(units, largest);
  std::vector<Tile> tiles;
  int64_t first = 0, weights = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = (units / count + (i < units % count)) * unit;
    tiles.push_back({first, size, weights});
    weights += (taps * channels + first + size + more) * size;
    first += size;
  }
  return tiles;
}

struct ImageBlocks {
  int64_t count, time;
};

// Returns the number of blocks of images per group, and the time of a position's channel in half vector operations.
// Large blocks reuse each loaded weight, and a load costs about half a vector operation; small blocks balance the
// threads.
ImageBlocks image_blocks(int64_t image_vectors, int64_t groups, int64_t threads, int64_t max_vectors) {
  ImageBlocks best{image_vectors, INT64_MAX};
  for (int64_t vectors = 1; vectors <= max_vectors; ++vectors) {
    const int64_t blocks = divide_up(image_vectors, vectors);
    const int64_t time = divide_up(groups * blocks, threads) * (2 * vectors + 1);
    if (time <= best.time) best = {blocks, time};
  }
  return best;
}

}  // namespace

template <typename T>
OwnedTaskPlan make_plan(const KernelProblem<T>& problem, int64_t family, int64_t groups, const Target& target,
                        int64_t threads) {
  OwnedTaskPlan plan{};
  const int64_t depth = problem.depth, height = problem.height, width = problem.width;
  plan.channels = problem.group_channels();
  const Lag step = problem.dilation;
  const int64_t pivot = pivot_column(family, problem.kernel_width);
  // The farthest tap in each direction that can reach into the image.
  const int64_t before = std::min(problem.kernel_depth - 1, (depth - 1) / step.planes),
                above = std::min(problem.kernel_height - 1, (height - 1) / step.rows),
                left = std::min(pivot, (width - 1) / step.columns),
                right = above ? std::min(problem.kernel_width - 1 - pivot, (width - 1) / step.columns) : 0;
  plan.planes_before = before * step.planes;
  plan.rows_above = above * step.rows;
  plan.left = left * step.columns;
  plan.right = right * step.columns;
  plan.skew = plan.right / step.rows + 1;
  const int64_t lanes = plan.lanes_per_vector = target.vector_bytes / int64_t(sizeof(T));
  const int64_t image_vectors = divide_up(problem.batch, lanes);

  // What a position reads, once per tile, and everything between that and itself.
  const int64_t input_bytes = problem.kernel_taps() * plan.channels * int64_t(sizeof(T));
  const int64_t position_lanes = lanes * std::min<int64_t>(image_vectors, target.max_vectors);
  const int64_t above_bytes = plan.rows_above * width * plan.channels * position_lanes * int64_t(sizeof(T));
  // All weights, if each lane has its own.
  const int64_t weight_bytes = problem.images_differ ? input_bytes * plan.channels * lanes : 0;
  const bool spilled = input_bytes * position_lanes > 4 * kBufferBytes || above_bytes > 8 * kBufferBytes ||
                       weight_bytes > kFirstLevelBytes;

  // Chooses the lanes: images if there are many, rows of few large images, channels of few small ones. A vector of
  // channels costs more, because no weight serves several. For rows and images, times are compared: a pixel goes into a
  // row's lane and back one by one, which costs about two vector operations.
  const int64_t positions = depth * height * width;
  const int64_t image_steps = image_vectors * positions * plan.channels * (spilled ? 2 : 1);
  const int64_t row_steps = depth * divide_up(height, lanes) * (width + plan.skew * (lanes - 1)) * plan.channels;
  const int64_t channel_vectors = divide_up(plan.channels, lanes);
  const int64_t channel_steps = problem.batch * positions * channel_vectors * 5 / 4;
  const int64_t operations = problem.batch * positions * plan.channels * input_bytes / target.vector_bytes * groups;
  const int64_t busy = std::min(threads, operations / kGrain + 1);  // threads worth waking
  const ImageBlocks images = image_blocks(image_vectors, groups, busy, problem.images_differ ? 1 : target.max_vectors);
  const int64_t image_time = images.time * positions * plan.channels * (spilled ? 2 : 1);
  const int64_t row_time =
      divide_up(groups * problem.batch, busy) * (row_steps * 3 + positions * 4 / problem.kernel_taps());
  plan.lanes = channel_steps < std::min(image_steps, problem.batch * row_steps) ? Lanes::channels
               : row_time < image_time                                          ? Lanes::rows
                                                                                : Lanes::images;

  plan.blocks = problem.batch;
  plan.vectors = 1;
  if (plan.lanes == Lanes::images) {
    plan.blocks = images.count;
    plan.vectors = divide_up(image_vectors, plan.blocks);
    plan.block_images = plan.vectors * lanes;
  } else if (plan.lanes == Lanes::rows) {
    plan.block_images = 1;
    plan.halo_lanes = plan.rows_above;
  } else {
    plan.block_images = problem.images_differ ? 1 : divide_up(problem.batch, std::max<int64_t>(1, threads / groups));
    plan.blocks = divide_up(problem.batch, plan.block_images);
  }
  plan.weight_blocks = problem.images_differ ? plan.blocks : 1;
  plan.weight_lanes = problem.images_differ && plan.lanes == Lanes::images ? lanes : 1;
  if (plan.lanes == Lanes::channels) {
    plan.channel_pitch = 1;
    plan.position_pitch = channel_vectors * lanes;
  } else {
    plan.channel_pitch = plan.halo_lanes + plan.vectors * lanes;
    plan.position_pitch = plan.channels * plan.channel_pitch;
  }

  int64_t first_position;  // position of a plane's first pixel
  if (plan.lanes == Lanes::rows) {
    plan.strip_rows = lanes;
    first_position = plan.skew * plan.rows_above + plan.left;
    plan.plane_pitch = (first_position + width + plan.skew * (lanes - 1)) * plan.position_pitch;
  } else {
    plan.halo_positions = std::max(plan.left, plan.right);
    plan.row_positions = plan.halo_positions + width;
    first_position = plan.rows_above * plan.row_positions + plan.halo_positions;
    const int64_t halo = plan.rows_above;
    // One row in all planes that a pixel reads.
    const int64_t row_bytes = (plan.planes_before + 1) * plan.row_positions * plan.position_pitch * int64_t(sizeof(T));
    // Whole vectors of rows, for tensors stored by columns.
    const int64_t unit = problem.stores_columns() ? lanes : 1;
    plan.strip_rows = std::min(height, std::max({kBufferBytes / row_bytes - halo, 2 * halo, unit}) / unit * unit);
    if (plan.lanes == Lanes::channels) plan.strip_rows = height;  // for long wavefronts
    plan.plane_pitch = (plan.strip_rows + halo) * plan.row_positions * plan.position_pitch;
  }
  plan.first_plane = plan.planes_before * plan.plane_pitch;
  plan.first_pixel = plan.first_plane + first_position * plan.position_pitch + plan.halo_lanes;
  plan.image_pitch = plan.first_plane + depth * plan.plane_pitch;
  plan.buffer_size = plan.image_pitch * (plan.lanes == Lanes::channels ? plan.block_images : 1);

  const size_t most_taps = problem.kernel_taps();
  plan.owned_taps.reserve(most_taps);
  plan.owned_offsets.reserve(most_taps * plan.channels);
  for (int64_t plane = before; plane >= 0; --plane)
    for (int64_t row = above; row >= 0; --row)
      for (int64_t column = left; column >= (row ? -right : 0); --column) {
        plan.owned_taps.push_back({plane, row, column});
        const int64_t rows = row * step.rows, columns = column * step.columns;
        const int64_t back = plan.lanes == Lanes::rows ? (plan.skew * rows + columns) * plan.position_pitch + rows
                                                       : (rows * plan.row_positions + columns) * plan.position_pitch;
        for (int64_t channel = 0; channel < plan.channels; ++channel)
          plan.owned_offsets.push_back(channel * plan.channel_pitch - back - plane * step.planes * plan.plane_pitch);
      }
  plan.tap_count = int64_t(plan.owned_taps.size());
  const int64_t kernel_taps = problem.kernel_taps();
  const int64_t mirror_images = plan.lanes == Lanes::channels ? kMirrorImages : 0;
  plan.owned_places.assign(mirror_images * kernel_taps, -1);
  for (int64_t image = 0; image < mirror_images; ++image)
    for (int64_t tap = 0; tap < plan.tap_count; ++tap)
      plan.owned_places[image * kernel_taps + problem.tap(family | image, plan.owned_taps[tap])] = tap;
  // Registers hold the sums, a vector of inputs for each vector of lanes, and a weight.
  const int64_t taps = plan.tap_count - 1;
  plan.owned_tiles = plan.lanes == Lanes::channels
                         ? make_tiles(plan.channels, lanes, taps, 1, kMaxChannelVectors)
                         : make_tiles(plan.channels, 1, taps, 0,
                                      std::min<int64_t>(kMaxTile, (target.registers - 1) / plan.vectors - 1));
  const int64_t tile_vectors = divide_up(plan.owned_tiles.front().size, lanes);
  plan.inputs = kInputBytes / (plan.owned_tiles.front().size * int64_t(sizeof(T)));
  plan.pixels = std::min<int64_t>(kMaxPixels, (target.registers - 1) / tile_vectors - 1);
  const Tile& last = plan.owned_tiles.back();
  plan.group_weights = last.weights + (taps * plan.channels + last.first + last.size + 1) * last.size;
  const int64_t steps =
      depth * (plan.lanes == Lanes::rows ? divide_up(height, lanes) * width : height * width * plan.vectors);
  plan.operations = plan.lanes == Lanes::channels ? plan.block_images * steps * plan.group_weights / lanes
                                                  : steps * plan.group_weights;
  plan.tile_count = int64_t(plan.owned_tiles.size());
  plan.tiles = plan.owned_tiles.data();
  plan.taps = plan.owned_taps.data();
  plan.places = plan.owned_places.data();
  plan.offsets = plan.owned_offsets.data();
  return plan;  // moved or elided, so the pointers stay valid
}

template OwnedTaskPlan make_plan(const KernelProblem<float>&, int64_t, int64_t, const Target&, int64_t);
template OwnedTaskPlan make_plan(const KernelProblem<double>&, int64_t, int64_t, const Target&, int64_t);

}  // namespace kconv
