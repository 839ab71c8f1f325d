// Launches the kernels of a plan on the current stream, without Python.
//
// For each new problem this calls back Python, which plans, compiles and loads, and caches the result. The driver's
// functions also come from Python, so a library built without CUDA serves every build of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kconv::cuda {

// Functions of libcuda, and one of libtorch_cuda. Handles are pointers; results are error codes.
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

struct LoadedPlan;

// Asks Python to plan. The words hold everything a plan depends on, as `_read` of
// nflows_kconv/backends/cuda/native_launcher.py expects: the address of the operation's name, dtype and device as
// numbers, flags for a unit diagonal, the transpose and a bias, kernel size [2], shape [4], strides of the first and
// second tensor [4], and one stencil per group. The strides of the output follow from them.
using Planner = void (*)(const int64_t* words, int64_t count, const int64_t* output_strides, LoadedPlan*);

}  // namespace kconv::cuda
