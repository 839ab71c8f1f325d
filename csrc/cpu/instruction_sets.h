// The kernels of each instruction set, defined in kernel_*.cpp.
#pragma once

#include "plan.h"

namespace kconv {

// The functions that an instruction set implements. Tasks write disjoint parts of the output.
template <typename T>
struct Kernels {
  Target target;
  // Packs the weights of one tile of a group into `packed`, which belongs to the group and, if images differ, the
  // block.
  void (*pack_weights)(const KernelProblem<T>&, const TaskPlan&, int64_t group, int64_t block, int64_t tile, T* packed);
  // Runs one task. `buffer` has plan.buffer_size elements; `places` has one for each pixel of the rows moved at once.
  void (*run_task)(const KernelProblem<T>&, const TaskPlan&, const T* packed, int64_t group, int64_t block, T* buffer,
                   int64_t* places);
};

extern const Kernels<float> baseline_float;
extern const Kernels<double> baseline_double;
#if defined(__x86_64__)
extern const Kernels<float> avx2_float, avx512_float;
extern const Kernels<double> avx2_double, avx512_double;
#endif

}  // namespace kconv
