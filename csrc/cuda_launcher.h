// Launches the kernels of a plan on the current stream: the CUDA implementation without Python on its way.
//
// Python plans, compiles and loads, once for each problem, when it is called back; what it hands over is kept here.
// The driver's functions come from Python as well, so that a library built without CUDA serves every build of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kconv::cuda {

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

// What Python is asked to plan; nflows_kconv/backends/cuda/native_launcher.py has the same struct.
struct Problem {
  int64_t operation;  // 0: conv, 1: solve, 2: weight_gradient
  int64_t dtype;      // torch's ScalarType
  int64_t device, unit_diagonal, transpose, bias;
  int64_t shape[4], kernel_size[2];
  int64_t first_strides[4], second_strides[4], output_strides[4];
  int64_t groups;
  const int64_t* stencils;
};

struct Plan;
using Planner = void (*)(const Problem*, Plan*);

}  // namespace kconv::cuda
