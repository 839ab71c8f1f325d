// Launches the kernels of a plan on the current stream: the CUDA implementation without Python on its way.
//
// Python plans, compiles and loads, once for each problem, when it is called back; what it hands over is kept here.
// The driver's functions come from Python as well, so that a library built without CUDA serves every build of torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kconv::cuda {

// See nflows_kconv/ops.py for what they compute. All throw std::runtime_error.
torch::stable::Tensor conv(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                           std::optional<torch::stable::Tensor> bias, std::vector<int64_t> corners, bool transpose);
torch::stable::Tensor solve(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                            std::optional<torch::stable::Tensor> bias, std::vector<int64_t> corners, bool transpose);
torch::stable::Tensor weight_gradient(const torch::stable::Tensor& input, const torch::stable::Tensor& grad,
                                      std::vector<int64_t> corners, std::vector<int64_t> kernel_size);

// Functions of libcuda and one of libtorch_cuda; handles are pointers, results are error codes.
struct Driver {
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                       void** extra);
  int (*set_bytes)(unsigned long long address, unsigned char value, size_t count, void* stream);
  int (*get_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*get_error_name)(int error, const char** name);
  int (*get_stream)(int device, void** stream);
};

// What Python is asked to plan; nflows_kconv/cuda/native_launcher.py has the same struct.
struct Problem {
  int64_t operation;  // 0: conv, 1: solve, 2: weight_gradient
  int64_t dtype;      // 0: float32, 1: float64, 2: float16, 3: bfloat16
  int64_t device, transpose, bias;
  int64_t shape[4], kernel_size[2];
  int64_t first_strides[4], second_strides[4], output_strides[4];
  int64_t groups;
  const int64_t* corners;
};

struct Plan;
using Planner = void (*)(const Problem*, Plan*);

}  // namespace kconv::cuda
