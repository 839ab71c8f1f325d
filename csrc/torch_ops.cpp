// The primitive as torch operators of the CPU, through torch's stable ABI: one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
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
  const int64_t dim = tensor.dim();
  return {tensor.stride(0), tensor.stride(1), dim == 5 ? tensor.stride(2) : 0, tensor.stride(dim - 2),
          tensor.stride(dim - 1)};
}

int64_t depth(const Tensor& tensor) { return tensor.dim() == 5 ? tensor.size(2) : 1; }

struct Operands {
  Tensor input, weight;
  std::optional<Tensor> bias, log_diagonal;
};

template <typename T>
const T* data(const Tensor& tensor) {
  // Freed under the tensor, as sharding libraries do.
  STD_TORCH_CHECK(tensor.const_data_ptr(), "the memory of the tensors must not have been freed");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <typename T>
void run(const Operands& operands, const std::vector<int64_t>& stencils, const std::vector<int64_t>& dilation,
         bool unit_diagonal, bool transpose, bool solve, Tensor& output) {
  const Tensor &input = operands.input, &weight = operands.weight;
  const kconv::Problem<T> problem{data<T>(input),
                                  static_cast<T*>(output.mutable_data_ptr()),
                                  data<T>(weight),
                                  data<T>(operands.bias),
                                  data<T>(operands.log_diagonal),
                                  unit_diagonal,
                                  strides(input),
                                  strides(output),
                                  input.size(0),
                                  input.size(1),
                                  depth(input),
                                  input.size(input.dim() - 2),
                                  input.size(input.dim() - 1),
                                  int64_t(stencils.size()),
                                  depth(weight),
                                  weight.size(weight.dim() - 2),
                                  weight.size(weight.dim() - 1),
                                  {dilation.size() == 3 ? dilation[0] : 1, dilation.rbegin()[1], dilation.back()},
                                  stencils.data(),
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

template <typename Function>
std::optional<Tensor> mapped(const std::optional<Tensor>& tensor, Function function) {
  if (!tensor) return std::nullopt;
  return function(*tensor);
}

// The arguments are those that nflows_kconv/ops.py has checked.
Tensor compute(Operands operands, const std::vector<int64_t>& stencils, const std::vector<int64_t>& dilation,
               bool unit_diagonal, bool transpose, bool solve) {
  const ScalarType dtype = operands.input.scalar_type();
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) {
    const auto wide = [](const Tensor& tensor) { return to(tensor, ScalarType::Float); };
    const Operands computed{wide(operands.input), wide(operands.weight), mapped(operands.bias, wide),
                            mapped(operands.log_diagonal, wide)};
    return to(compute(computed, stencils, dilation, unit_diagonal, transpose, solve), dtype);
  }
  Tensor output = kconv::telling("allocate memory", [&] { return torch::stable::empty_like(operands.input); });
  if (operands.input.numel() == 0) return output;
  operands.weight = dense(operands.weight);
  operands.bias = mapped(operands.bias, dense);
  operands.log_diagonal = mapped(operands.log_diagonal, dense);
  if (dtype == ScalarType::Float)
    run<float>(operands, stencils, dilation, unit_diagonal, transpose, solve, output);
  else
    run<double>(operands, stencils, dilation, unit_diagonal, transpose, solve, output);
  return output;
}

template <bool kSolve>
Tensor run_operator(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                    std::optional<Tensor> log_diagonal, std::vector<int64_t> stencils, std::vector<int64_t> dilation,
                    bool unit_diagonal, bool transpose) {
  return compute({input, weight, bias, log_diagonal}, stencils, dilation, unit_diagonal, transpose, kSolve);
}

}  // namespace

// Beside these stand the operators of the CUDA launcher, in cuda_launcher.cpp.
STABLE_TORCH_LIBRARY(nflows_kconv_native, library) {
  for (const std::string name : {"conv", "solve", "conv_cuda", "solve_cuda"}) {
    const std::string dilation = name.size() > 5 ? "" : "int[] dilation, ";  // the CUDA kernels have none
    library.def((name + "(Tensor input, Tensor weight, Tensor? bias, Tensor? log_diagonal, int[] stencils, " +
                 dilation + "bool unit_diagonal, bool transpose) -> Tensor")
                    .c_str());
  }
  library.def(
      "weight_gradient_cuda(Tensor input, Tensor grad, int[] stencils, int[] kernel_size, bool unit_diagonal) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nflows_kconv_native, CPU, library) {
  library.impl("conv", TORCH_BOX(&run_operator<false>));
  library.impl("solve", TORCH_BOX(&run_operator<true>));
}

// Which instruction set is in use, and how tests and benchmarks select one.
KCONV_EXPORT const char* nflows_kconv_instruction_set() { return kconv::instruction_set(); }

KCONV_EXPORT int nflows_kconv_select_instruction_set(const char* name) {
  return kconv::select_instruction_set(name) ? 0 : 1;
}
