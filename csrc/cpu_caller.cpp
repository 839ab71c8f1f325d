// The CPU kernel as functions that Python calls with a packed `Problem`, on torch's threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/problem.h"
#include "export.h"

namespace {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

template <typename T>
kconv::Outcome run(const kconv::Problem<T>* problem) {
  return kconv::run(*problem, torch::stable::get_num_threads(), parallel_for);
}

}  // namespace

KCONV_EXPORT kconv::Outcome nflows_kconv_run_float(const kconv::Problem<float>* problem) { return run(problem); }
KCONV_EXPORT kconv::Outcome nflows_kconv_run_double(const kconv::Problem<double>* problem) { return run(problem); }

// Which instruction set is in use, and how tests and benchmarks select one.
KCONV_EXPORT const char* nflows_kconv_instruction_set() { return kconv::instruction_set(); }

KCONV_EXPORT int nflows_kconv_select_instruction_set(const char* name) {
  return kconv::select_instruction_set(name) ? 0 : 1;
}
