// Runs the CPU kernel on torch's tensors and threads.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/problem.h"
#include "export.h"

namespace {

using kconv::Outcome;

// The options of a layer, the same at every call. Keep equal to nflows_kconv/backends/native.py.
struct Options {
  const int64_t* stencils;  // one per group
  int64_t groups, dimensions;
  kconv::Lag dilation;
  bool unit_diagonal, transpose, solve;
};

// Packed by nflows_kconv/backends/cpu.py: ctypes converts one pointer faster than six. The last two may be null.
struct Arguments {
  const Options* options;
  void *input, *output, *weight, *bias, *log_diagonal;
};

// Bytes of a group's weights that stay in a second-level cache. Every position reads all of them, so beyond this size
// torch's convolution, which holds several positions in registers, is faster.
constexpr int64_t kCachedWeights = 1 << 20;

constexpr int kMaxDimensions = 5;

// A dense CPU tensor.
struct View {
  void* data = nullptr;
  int32_t dtype = -1;
  int64_t dimensions = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;

  int64_t count() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dimensions; ++i) count *= sizes[i];
    return count;
  }

  bool contiguous() const {
    for (int64_t i = dimensions, step = 1; i-- > 0; step *= sizes[i])
      if (sizes[i] != 1 && strides[i] != step) return false;
    return true;
  }
};

// `tensor` is Python's Tensor._cdata; a handle of torch's C interface points to a variable that holds it.
bool read(void* tensor, View& view) {
  const auto handle = reinterpret_cast<AtenTensorHandle>(&tensor);
  int32_t device = -1, layout = -1;
  int64_t *sizes = nullptr, *strides = nullptr;
  const bool dense = aoti_torch_get_device_type(handle, &device) == 0 && device == aoti_torch_device_type_cpu() &&
                     aoti_torch_get_layout(handle, &layout) == 0 && layout == aoti_torch_layout_strided() &&
                     aoti_torch_get_dim(handle, &view.dimensions) == 0 && view.dimensions <= kMaxDimensions &&
                     aoti_torch_get_dtype(handle, &view.dtype) == 0 && aoti_torch_get_sizes(handle, &sizes) == 0 &&
                     aoti_torch_get_strides(handle, &strides) == 0 && aoti_torch_get_data_ptr(handle, &view.data) == 0;
  view.sizes = sizes;
  view.strides = strides;
  return dense;
}

// Reads one number per channel; null is allowed.
bool read_channels(void* tensor, const View& input, View& view) {
  return !tensor || (read(tensor, view) && view.dtype == input.dtype && view.dimensions == 1 &&
                     view.sizes[0] == input.sizes[1] && view.contiguous());
}

kconv::Strides strides_of(const View& images) {
  const int64_t axes = images.dimensions - 2, *last = images.strides + images.dimensions - 1;
  return {axes > 2 ? last[-2] : 0, images.strides[0], images.strides[1], axes > 1 ? last[-1] : 0, last[0]};
}

bool fits(const Options& options, const View& input, const View& weight) {
  const int64_t dimensions = options.dimensions + 2;
  if (input.dimensions != dimensions || weight.dimensions != dimensions || weight.dtype != input.dtype) return false;
  return input.count() > 0 && weight.count() > 0 && weight.contiguous() && weight.sizes[0] == input.sizes[1] &&
         weight.sizes[0] == weight.sizes[1] * options.groups;
}

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

template <typename T>
Outcome run(const Options& options, const View& input, const View& output, const View& weight, const View& bias,
            const View& log_diagonal) {
  if (!options.solve && weight.count() * int64_t(sizeof(T)) > kCachedWeights * options.groups) return Outcome::declined;
  kconv::KernelProblem<T> problem{};
  problem.input = static_cast<const T*>(input.data);
  problem.output = static_cast<T*>(output.data);
  problem.weight = static_cast<const T*>(weight.data);
  problem.bias = static_cast<const T*>(bias.data);
  problem.log_diagonal = static_cast<const T*>(log_diagonal.data);
  problem.stencils = options.stencils;
  problem.input_strides = strides_of(input);
  problem.output_strides = strides_of(output);
  // An image is a volume of one plane; a sequence is one of one row.
  const auto size = [&](const View& view, int axis) {  // of three
    const int64_t own = axis - 3 + options.dimensions;
    return own < 0 ? 1 : view.sizes[2 + own];
  };
  problem.depth = size(input, 0);
  problem.batch = input.sizes[0];
  problem.channels = input.sizes[1];
  problem.height = size(input, 1);
  problem.width = size(input, 2);
  problem.groups = options.groups;
  problem.kernel_depth = size(weight, 0);
  problem.kernel_height = size(weight, 1);
  problem.kernel_width = size(weight, 2);
  problem.dilation = options.dilation;
  problem.unit_diagonal = options.unit_diagonal;
  problem.transpose = options.transpose;
  problem.solve = options.solve;
  return kconv::run(problem, torch::stable::get_num_threads(), parallel_for);
}

}  // namespace

// Runs the operator of the options on tensors as in `functional.conv2d`. If they do not fit, declines and does nothing;
// the caller finds out why.
KCONV_EXPORT Outcome nflows_kconv_run(const Arguments* arguments) {
  const auto& [options, input, output, weight, bias, log_diagonal] = *arguments;
  View in, out, kernel, shift, diagonal;
  if (!read(input, in) || !read(output, out) || !read(weight, kernel) || !fits(*options, in, kernel) ||
      !read_channels(bias, in, shift) || !read_channels(log_diagonal, in, diagonal))
    return Outcome::declined;
  // Zero tensors and freed ones have no memory.
  if (!in.data || !out.data || !kernel.data || (bias && !shift.data) || (log_diagonal && !diagonal.data))
    return Outcome::declined;
  if (in.dtype == aoti_torch_dtype_float32()) return run<float>(*options, in, out, kernel, shift, diagonal);
  if (in.dtype == aoti_torch_dtype_float64()) return run<double>(*options, in, out, kernel, shift, diagonal);
  return Outcome::declined;
}

// Return and select the instruction set, for the status, tests and benchmarks.
KCONV_EXPORT const char* nflows_kconv_instruction_set() { return kconv::instruction_set(); }

KCONV_EXPORT int nflows_kconv_select_instruction_set(const char* name) {
  return kconv::select_instruction_set(name) ? 0 : 1;
}
