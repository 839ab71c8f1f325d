#include "cuda_launcher.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "export.h"
#include "torch_errors.h"

namespace kconv::cuda {

using torch::stable::Tensor;

struct Launch {
  void* function;
  std::array<unsigned, 3> grid;
  unsigned block, shared;
  std::vector<char> arguments;  // starting with room for the pointers of a call
};

struct LoadedPlan {
  std::vector<Launch> launches;
  void* context = nullptr;
  int64_t scratch = 0, zeroed = 0;  // bytes
  int64_t output_strides[4];
  std::optional<std::string> error;
};

namespace {

constexpr size_t kMaxPlans = 4096;

using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.size();
    for (int64_t word : key) {
      hash = (hash ^ uint64_t(word)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// All state of the process. No lock is held while Python runs.
Driver driver;
Planner planner;
std::shared_mutex mutex;
std::unordered_map<Key, std::shared_ptr<const LoadedPlan>, Hash> plans;

// Whether this thread's last allocation failed, because torch passes on only the text of an exception.
thread_local bool out_of_memory;

void check(int error, const char* function) {
  if (error == 0) return;
  const char* name = nullptr;
  driver.get_error_name(error, &name);
  throw std::runtime_error(std::string(function) + " failed: " + (name ? name : std::to_string(error)));
}

class ContextGuard {
 public:
  // A thread that has not used CUDA yet has no context, and another device may be the current one.
  explicit ContextGuard(void* context) {
    void* current = nullptr;
    check(driver.get_context(&current), "cuCtxGetCurrent");
    if (current == context) return;
    check(driver.push_context(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~ContextGuard() {
    void* popped;
    if (pushed_) driver.pop_context(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  bool pushed_ = false;
};

struct View {  // the properties of a 4-dimensional tensor that launching needs
  int32_t dtype, device_type, device;
  int64_t *sizes, *strides;
};

View view(const Tensor& tensor) {
  View view;
  check_torch(aoti_torch_get_dtype(tensor.get(), &view.dtype), "read a dtype");
  check_torch(aoti_torch_get_device_type(tensor.get(), &view.device_type), "read a device");
  check_torch(aoti_torch_get_device_index(tensor.get(), &view.device), "read a device");
  check_torch(aoti_torch_get_sizes(tensor.get(), &view.sizes), "read sizes");
  check_torch(aoti_torch_get_strides(tensor.get(), &view.strides), "read strides");
  return view;
}

Tensor allocate(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype, const View& like) {
  AtenTensorHandle handle;
  out_of_memory =
      aoti_torch_empty_strided(dimensions, sizes, strides, dtype, like.device_type, like.device, &handle) != 0;
  if (out_of_memory) throw std::runtime_error("out of memory: " + torch_reason("allocate memory"));
  return Tensor(handle);
}

std::shared_ptr<const LoadedPlan> find(const Key& key) {
  const std::shared_lock lock(mutex);
  const auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

std::shared_ptr<const LoadedPlan> make(const Key& key, const int64_t* output_strides) {
  const auto plan = std::make_shared<LoadedPlan>();
  std::copy_n(output_strides, 4, plan->output_strides);
  STD_TORCH_CHECK(planner != nullptr, "nflows_kconv must be imported");
  planner(key.data(), int64_t(key.size()), output_strides, plan.get());
  if (plan->error) throw std::runtime_error(*plan->error);
  const std::unique_lock lock(mutex);
  // Dropping all at once is enough: planning again takes microseconds, and Python keeps the compiled code.
  if (plans.size() >= kMaxPlans) plans.clear();
  plans[key] = plan;
  return plan;
}

// The tensors of a call. Vectors are contiguous.
struct Operands {
  const Tensor &first, &second;
  std::optional<Tensor> bias, log_diagonal;
};

const void* data(const Tensor& tensor) {
  // Sharding libraries free the memory of a live tensor.
  STD_TORCH_CHECK(tensor.const_data_ptr(), "the memory of a tensor must not have been freed");
  return tensor.const_data_ptr();
}

const void* data(const std::optional<Tensor>& tensor) { return tensor ? data(*tensor) : nullptr; }

void launch(const LoadedPlan& plan, const Operands& operands, const Tensor& output, const View& like) {
  Tensor memory = output;  // placeholder without scratch
  const void* pointers[] = {data(operands.first), data(operands.second),      output.mutable_data_ptr(), nullptr,
                            data(operands.bias),  data(operands.log_diagonal)};
  void* stream;
  check_torch(driver.get_stream(like.device, &stream), "find the current stream");
  if (plan.scratch > 0) {
    const int64_t stride = 1;
    memory = allocate(1, &plan.scratch, &stride, aoti_torch_dtype_uint8(), like);
    pointers[3] = memory.mutable_data_ptr();
  }
  const ContextGuard guard(plan.context);
  if (plan.zeroed > 0) {
    check(driver.set_bytes(reinterpret_cast<uintptr_t>(pointers[3]), 0, size_t(plan.zeroed), stream),
          "cuMemsetD8Async");
  }
  for (const Launch& launch : plan.launches) {
    thread_local std::vector<char> arguments;  // reused, so a call allocates nothing
    arguments = launch.arguments;
    std::memcpy(arguments.data(), pointers, sizeof pointers);
    void* parameters[] = {arguments.data()};
    check(driver.launch_kernel(launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.block, 1, 1,
                               launch.shared, stream, parameters, nullptr),
          "cuLaunchKernel");
  }
}

constexpr char kConv[] = "conv", kSolve[] = "solve", kWeightGradient[] = "weight_gradient",
               kLogAbsDet[] = "log_abs_det";

// The differences between the operators.
struct Operator {
  const char* name;
  bool unit_diagonal, transpose;
  const int64_t* kernel_size;
  const int64_t* output_sizes;
};

Tensor run(const Operator& op, const Operands& operands, const std::vector<int64_t>& stencils) {
  const Tensor &first = operands.first, &second = operands.second;
  const View a = view(first), b = view(second);
  const bool images = op.output_sizes == a.sizes;
  if (first.numel() == 0) {
    return images ? torch::stable::empty_like(first)
                  : torch::stable::new_zeros(first, torch::headeronly::IntHeaderOnlyArrayRef(op.output_sizes, 4));
  }

  thread_local Key key;
  key.assign({reinterpret_cast<int64_t>(op.name), a.dtype, a.device, op.unit_diagonal, op.transpose,
              operands.bias.has_value(), op.kernel_size[0], op.kernel_size[1]});
  key.insert(key.end(), a.sizes, a.sizes + 4);
  key.insert(key.end(), a.strides, a.strides + 4);
  key.insert(key.end(), b.strides, b.strides + 4);
  key.insert(key.end(), stencils.begin(), stencils.end());
  std::shared_ptr<const LoadedPlan> plan = find(key);
  if (plan == nullptr) {
    int64_t strides[4];
    if (images) {
      std::copy_n(view(torch::stable::empty_like(first)).strides, 4, strides);
    } else {
      for (int64_t i = 3, stride = 1; i >= 0; stride *= op.output_sizes[i--]) strides[i] = stride;
    }
    plan = make(Key(key), strides);
  }
  const int64_t one = 1;  // sums of images are [B], and not in half precision
  const int32_t wide = a.dtype == aoti_torch_dtype_float64() ? a.dtype : aoti_torch_dtype_float32();
  const Tensor output = op.name == kLogAbsDet ? allocate(1, a.sizes, &one, wide, a)
                                              : allocate(4, op.output_sizes, plan->output_strides, a.dtype, a);
  launch(*plan, operands, output, a);
  return output;
}

std::optional<Tensor> dense(const std::optional<Tensor>& vector) {
  if (!vector || vector->stride(0) == 1) return vector;
  return telling("allocate memory", [&] { return torch::stable::contiguous(*vector); });
}

// The arguments are those that nflows_kconv/ops.py has checked.
template <const char* kName>
Tensor run_on_images(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                     std::optional<Tensor> log_diagonal, std::vector<int64_t> stencils, bool unit_diagonal,
                     bool transpose) {
  return run({kName, unit_diagonal, transpose, view(weight).sizes + 2, view(input).sizes},
             {input, weight, dense(bias), dense(log_diagonal)}, stencils);
}

Tensor weight_gradient(const Tensor& input, const Tensor& grad, std::vector<int64_t> stencils,
                       std::vector<int64_t> kernel_size, bool unit_diagonal) {
  const int64_t channels = input.size(1);
  const int64_t sizes[] = {channels, channels / int64_t(stencils.size()), kernel_size[0], kernel_size[1]};
  return run({kWeightGradient, unit_diagonal, false, kernel_size.data(), sizes},
             {input, grad, std::nullopt, std::nullopt}, stencils);
}

}  // namespace
}  // namespace kconv::cuda

using namespace kconv::cuda;

// Their arguments are those that nflows_kconv/ops.py has checked.
STABLE_TORCH_LIBRARY(nflows_kconv_native, library) {
  for (const std::string name : {"conv_cuda", "solve_cuda", "log_abs_det_cuda"}) {
    library.def((name + "(Tensor input, Tensor weight, Tensor? bias, Tensor? log_diagonal, int[] stencils, "
                        "bool unit_diagonal, bool transpose) -> Tensor")
                    .c_str());
  }
  library.def(
      "weight_gradient_cuda(Tensor input, Tensor grad, int[] stencils, int[] kernel_size, bool unit_diagonal) -> "
      "Tensor");
}

// For every device, because tests call them with CPU tensors.
STABLE_TORCH_LIBRARY_IMPL(nflows_kconv_native, CompositeExplicitAutograd, library) {
  library.impl("conv_cuda", TORCH_BOX(&run_on_images<kConv>));
  library.impl("solve_cuda", TORCH_BOX(&run_on_images<kSolve>));
  library.impl("log_abs_det_cuda", TORCH_BOX(&run_on_images<kLogAbsDet>));
  library.impl("weight_gradient_cuda", TORCH_BOX(&weight_gradient));
}

// Forgets all plans. Called before the first one is made, and by tests.
KCONV_EXPORT void nflows_kconv_set_planner(Planner value) {
  const std::unique_lock lock(mutex);
  plans.clear();
  planner = value;
}

// The planner calls the rest.
KCONV_EXPORT void nflows_kconv_set_driver(const Driver* value) { driver = *value; }

KCONV_EXPORT void nflows_kconv_add_launch(LoadedPlan* plan, void* function, const unsigned* grid, unsigned block,
                                          unsigned shared, const char* arguments, uint64_t size) {
  plan->launches.push_back({function, {grid[0], grid[1], grid[2]}, block, shared, {arguments, arguments + size}});
}

KCONV_EXPORT void nflows_kconv_finish_plan(LoadedPlan* plan, void* context, int64_t scratch, int64_t zeroed) {
  plan->context = context;
  plan->scratch = scratch;
  plan->zeroed = zeroed;
}

KCONV_EXPORT void nflows_kconv_plan_error(LoadedPlan* plan, const char* error) { plan->error.emplace(error); }

// Called after an operator has thrown.
KCONV_EXPORT bool nflows_kconv_out_of_memory() { return out_of_memory; }
