// Chooses an instruction set and runs a problem's tasks on the caller's threads.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "instruction_sets.h"

namespace kconv {
namespace {

struct InstructionSet {
  const char* name;
  bool present;
  const Kernels<float>* of_float;
  const Kernels<double>* of_double;

  const Kernels<float>& kernels(float) const { return *of_float; }
  const Kernels<double>& kernels(double) const { return *of_double; }
};

const InstructionSet kInstructionSets[] = {
// the widest first
#if defined(__x86_64__)
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq"),
     &avx512_float, &avx512_double},
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2_float, &avx2_double},
#endif
    {"baseline", true, &baseline_float, &baseline_double}};

std::atomic<const InstructionSet*> selected{nullptr};

const InstructionSet& current() {
  if (const InstructionSet* set = selected.load()) return *set;
  const InstructionSet* set = kInstructionSets;
  while (!set->present) ++set;
  return *set;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) {  // whole cache lines, because vectors across two lines cost twice
  Memory memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Memory of one thread, kept between calls unless it is large, because page faults cost as much as a small problem.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (size_ < bytes) {
      size_ = 0;
      memory_.reset();
      memory_ = allocate(bytes);
      size_ = bytes;
    }
    return memory_.get();
  }

  void give_back() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = 4 << 20;
  Memory memory_;
  size_t size_ = 0;
};

thread_local Scratch scratch;

template <typename T>
bool has_reciprocals(const KernelProblem<T>& problem) {
  const int64_t channels = problem.group_channels(), taps = problem.kernel_taps();
  const int64_t count = problem.channels * (problem.images_differ ? problem.batch : 1);
  for (int64_t channel = 0; channel < count; ++channel) {
    const int64_t stencil = problem.stencils[channel / channels % problem.groups];
    const int64_t pivot = problem.in_frame_of(family(stencil)).tap(stencil, {0, 0, 0});
    const T own = problem.weight[(channel * channels + channel % channels) * taps + pivot];
    const T value = problem.diagonal(channel, own);
    if (!(std::abs(value * (1 / value) - 1) < 0.5))
      return false;  // also false for a denormal whose reciprocal overflows
  }
  return true;
}

template <typename T>
struct Run {
  const KernelProblem<T>& problem;
  const TaskPlan& plan;
  const Kernels<T>& kernels;
  const int64_t* groups;
  T* packed;
  std::atomic<bool> out_of_memory{false};

  // Returns the packed weights of a task, or of a group whose tasks share them.
  T* weights(int64_t group, int64_t block) const {
    const int64_t index = plan.weight_blocks == 1 ? group : group * plan.weight_blocks + block;
    return packed + index * plan.group_weights * plan.weight_lanes;
  }
};

template <typename T>
void pack_tiles(int64_t begin, int64_t end, void* context) {
  const Run<T>& run = *static_cast<const Run<T>*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = i % run.plan.tile_count, block = i / run.plan.tile_count % run.plan.weight_blocks;
    const int64_t group = i / run.plan.tile_count / run.plan.weight_blocks;
    run.kernels.pack_weights(run.problem, run.plan, run.groups[group], block, tile, run.weights(group, block));
  }
}

template <typename T>
void run_tasks(int64_t begin, int64_t end, void* context) {
  Run<T>& run = *static_cast<Run<T>*>(context);
  const TaskPlan& plan = run.plan;
  const size_t buffer_bytes = (plan.buffer_size * sizeof(T) + 63) / 64 * 64;
  const int64_t rows = plan.strip_rows + plan.rows_above;
  char* memory;
  try {
    memory = static_cast<char*>(scratch.get(buffer_bytes + rows * run.problem.width * sizeof(int64_t)));
  } catch (const std::bad_alloc&) {  // an exception must not leave a parallel region
    run.out_of_memory = true;
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / plan.blocks, block = task % plan.blocks;
    run.kernels.run_task(run.problem, plan, run.weights(group, block), run.groups[group], block,
                         reinterpret_cast<T*>(memory), reinterpret_cast<int64_t*>(memory + buffer_bytes));
  }
  scratch.give_back();
}

// Runs the groups of one family. The problem is in the family's frame.
template <typename T>
void run_family(const KernelProblem<T>& problem, int64_t family, const std::vector<int64_t>& groups, int64_t threads,
                ParallelFor parallel_for) {
  const Kernels<T>& kernels = current().kernels(T());
  const int64_t count = int64_t(groups.size());
  const OwnedTaskPlan plan = make_plan(problem, family, count, kernels.target, threads);
  const int64_t packings = count * plan.weight_blocks, packing = plan.group_weights * plan.weight_lanes;
  const Memory packed = allocate(packings * packing * sizeof(T));
  Run<T> run{problem, plan, kernels, groups.data(), static_cast<T*>(packed.get())};

  parallel_for(packings * plan.tile_count, kGrain * plan.tile_count / packing + 1, pack_tiles<T>, &run);
  parallel_for(count * plan.blocks, kGrain / plan.operations + 1, run_tasks<T>, &run);
  if (run.out_of_memory) throw std::bad_alloc();
}

}  // namespace

template <typename T>
Outcome run(const KernelProblem<T>& given, int64_t threads, ParallelFor parallel_for) try {
  const KernelProblem<T> problem = given.with_images_of_groups();
  if ((problem.solve || problem.log_diagonal) && !has_reciprocals(problem)) return Outcome::declined;
  for (const int64_t one : kFamilies) {
    std::vector<int64_t> groups;
    for (int64_t group = 0; group < problem.groups; ++group)
      if (family(problem.stencils[group]) == one) groups.push_back(group);
    if (!groups.empty()) run_family(problem.in_frame_of(one), one, groups, threads, parallel_for);
  }
  return Outcome::done;
} catch (const std::bad_alloc&) {
  return Outcome::out_of_memory;
}

template Outcome run(const KernelProblem<float>&, int64_t, ParallelFor);
template Outcome run(const KernelProblem<double>&, int64_t, ParallelFor);

const char* instruction_set() { return current().name; }

bool select_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets)
    if (set.present && std::strcmp(set.name, name) == 0) {
      selected = &set;
      return true;
    }
  return false;
}

}  // namespace kconv
