// The primitive as torch operators of the CPU, through torch's stable ABI: one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/problem.h"
#include "export.h"
#include "torch_errors.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

kconv::Strides strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

template <typename T>
void run(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
         const std::vector<int64_t>& corners, bool transpose, bool solve, Tensor& output) {
  const kconv::Problem<T> problem{static_cast<const T*>(input.const_data_ptr()),
                                  static_cast<T*>(output.mutable_data_ptr()),
                                  static_cast<const T*>(weight.const_data_ptr()),
                                  bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
                                  strides(input),
                                  strides(output),
                                  input.size(0),
                                  input.size(1),
                                  input.size(2),
                                  input.size(3),
                                  int64_t(corners.size()),
                                  weight.size(2),
                                  weight.size(3),
                                  corners.data(),
                                  transpose,
                                  solve};
  try {
    kconv::run(problem, torch::stable::get_num_threads(), parallel_for);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("not enough memory for the buffers of the CPU kernel");
  }
}

Tensor to(const Tensor& tensor, ScalarType dtype) {
  return kconv::telling("convert a dtype", [&] { return torch::stable::to(tensor, dtype); });
}

Tensor dense(const Tensor& tensor) {
  return kconv::telling("allocate memory", [&] { return torch::stable::contiguous(tensor); });
}

Tensor compute(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
               const std::vector<int64_t>& corners, bool transpose, bool solve) {
  const int64_t groups = int64_t(corners.size());
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "input and weight must have 4 dimensions");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) == input.size(1) && weight.size(1) * groups == input.size(1) &&
                      weight.size(2) > 0 && weight.size(3) > 0,
                  "weight must have shape [C, C/G, kh, kw] for an input of C channels and G corners");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == input.size(1)),
                  "bias must have shape [C] for an input of C channels");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == input.scalar_type()),
                  "input, weight and bias must have one dtype");
  STD_TORCH_CHECK(input.is_cpu() && weight.is_cpu() && (!bias || bias->is_cpu()),
                  "input, weight and bias must be on the CPU");
  for (int64_t corner : corners) STD_TORCH_CHECK(corner >= 0 && corner < 4, "corners must be 0, 1, 2 or 3");

  const ScalarType dtype = input.scalar_type();
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) {
    constexpr ScalarType computed = ScalarType::Float;
    if (bias) bias = to(*bias, computed);
    return to(compute(to(input, computed), to(weight, computed), bias, corners, transpose, solve), dtype);
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "dtype must be a floating point of 16 to 64 bits");

  Tensor output = kconv::telling("allocate memory", [&] { return torch::stable::empty_like(input); });
  if (input.numel() == 0) return output;
  // Freed under the tensor, as sharding libraries do. The conversions above would already have crashed, as all of
  // torch.
  STD_TORCH_CHECK(input.const_data_ptr() && weight.const_data_ptr() && (!bias || bias->const_data_ptr()),
                  "the memory of the tensors must not have been freed");
  const Tensor dense_weight = dense(weight);
  if (bias) bias = dense(*bias);
  if (dtype == ScalarType::Float)
    run<float>(input, dense_weight, bias, corners, transpose, solve, output);
  else
    run<double>(input, dense_weight, bias, corners, transpose, solve, output);
  return output;
}

// Bytes of a group's weights that stay in a second-level cache. Every position reads them all, so that beyond this size
// F.conv2d, which holds several positions in registers, is the faster forward.
constexpr int64_t kCachedWeights = 1 << 20;

Tensor conv(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> corners,
            bool transpose) {
  const int64_t weights = corners.empty() ? 0 : weight.numel() / int64_t(corners.size());
  if (weights * int64_t(weight.element_size()) <= kCachedWeights) {
    return compute(input, weight, bias, corners, transpose, false);
  }
  std::array<StableIValue, 5> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(corners),
                                    torch::stable::detail::from(transpose)};
  kconv::check_torch(torch_call_dispatcher("nflows_kconv::conv_reference", "", stack.data(), TORCH_ABI_VERSION),
                     "run the reference implementation");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor solve(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> corners,
             bool transpose) {
  return compute(input, weight, bias, corners, transpose, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nflows_kconv, CPU, library) {
  library.impl("conv", TORCH_BOX(&conv));
  library.impl("solve", TORCH_BOX(&solve));
}

// Which instruction set is in use, and how tests and benchmarks select one.
KCONV_EXPORT const char* nflows_kconv_instruction_set() { return kconv::instruction_set(); }

KCONV_EXPORT int nflows_kconv_select_instruction_set(const char* name) {
  return kconv::select_instruction_set(name) ? 0 : 1;
}
