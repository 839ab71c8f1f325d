// Runs the thread blocks of a kernel on one CPU thread. Every CUDA thread is a fiber that runs until it waits.
//
// Whatever CUDA leaves open is chosen to reveal mistakes. The seed makes the order of threads increasing (-1),
// decreasing (-2) or random; with the last two, several blocks run at a time and later ones may start first. Shared
// memory starts as NaN. Asynchronous copies complete at once or as late as allowed. Released counters become visible as
// late as allowed.
//
// Everything CUDA forbids is an error: unordered accesses to the same memory, barriers that some threads never reach,
// shuffles from inactive lanes, accesses outside shared memory. Stricter than CUDA, no thread may return before a
// barrier of its block or its warp.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <random>
#include <vector>

#include "races.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 1 << 18;
constexpr size_t kSharedMemory = 1 << 18, kMargin = 1 << 12;
constexpr unsigned char kUnwritten = 0xff;  // NaN in every type
constexpr size_t kBlocksAtATime = 3;
constexpr int kIdleRounds = 20;       // before other blocks run
constexpr size_t kFruitless = 1000;   // consecutive turns of blocks without progress that count as a deadlock
constexpr int kMostBarriers = 10000;  // of a block that count as an endless loop; the kernels pass hundreds

}  // namespace

alignas(4096) char shared_memory_area[kMargin + kSharedMemory];
asm(".globl shared_memory\n.set shared_memory, shared_memory_area + 4096");  // kMargin
extern char shared_memory[];

namespace emulator {
namespace {

enum class State { kReady, kPolling, kInWarp, kAtBarrier, kDone };

struct Copy {
  void* target;
  char bytes[16];
  int size;
};

// Of the compiler's own setjmp, which costs a fraction of the library's.
using Context = void* [5];

struct Fiber {
  Context context;
  bool started = false;
  int thread = 0;
  State state = State::kReady;
  std::vector<Copy> copies;
  int line = 0;
  int syncwarps = 0;    // with all lanes
  Knowledge knowledge;  // its own, until the next barrier
  // In a warp
  Meeting meeting;
  unsigned mask;
  int detail;
  uint64_t value;
  int from;
  Exchange exchange;
  // At a barrier
  Barrier barrier;
  bool predicate;
  int count;
};

struct Block {
  std::vector<Fiber> fibers;
  char* stacks;
  uint3 index;
  unsigned number;  // in grid order
  std::vector<char> shared;
  Memory shared_accesses;
  Knowledge knowledge;                // shared by all its threads
  std::map<const int*, size_t> seen;  // next release of a counter to see
  std::vector<int> ready, polling;
  std::vector<unsigned> in_warp;  // lanes of each warp that wait for others
  int at_barrier, done;
  int barriers;     // passed by all threads
  int idle_rounds;  // consecutive rounds in which threads only polled memory
};

// A value written to a counter, and the knowledge that a reader gains.
struct Release {
  int value;
  Knowledge knowledge;
};

struct Run {
  void (*kernel)(const void*);
  const Launch& launch;
  std::mt19937 random;
  Memory output, scratch;
  std::map<const int*, std::vector<Release>> releases;  // the first one is the initial value
  Context scheduler{};
  ucontext_t start{};      // of the fiber that starts
  Block* block = nullptr;  // whose shared memory is mapped
  Fiber* fiber = nullptr;  // running
  bool failed = false;
};

Run* run;

bool random_order() { return run->launch.seed >= 0; }
bool coin() { return run->random() & 1; }

// These three are opaque to the optimizer, which does not see other fibers run in between and use the registers.
[[noreturn]] __attribute__((noipa)) void jump(Context& context) { __builtin_longjmp(context, 1); }

__attribute__((noipa)) void leave() {
  if (!__builtin_setjmp(run->fiber->context)) jump(run->scheduler);
}

void fiber_main() {
  for (;;) {
    run->kernel(run->launch.arguments);
    run->fiber->copies.clear();
    run->fiber->state = State::kDone;
    leave();
  }
}

__attribute__((noipa)) void resume(Fiber& fiber) {
  run->fiber = &fiber;
  threadIdx = {(unsigned)fiber.thread, 0, 0};
  if (!__builtin_setjmp(run->scheduler)) {
    if (fiber.started) jump(fiber.context);
    fiber.started = true;
    getcontext(&run->start);
    run->start.uc_stack.ss_sp = run->block->stacks + fiber.thread * kStack;
    run->start.uc_stack.ss_size = kStack;
    makecontext(&run->start, fiber_main, 0);
    setcontext(&run->start);
  }
  run->fiber = nullptr;
}

void record(const char* format, va_list values) {
  if (run->failed) return;
  run->failed = true;
  const Block* block = run->block;
  int used = snprintf(run->launch.error, run->launch.error_size, "block (%u, %u, %u)", block->index.x, block->index.y,
                      block->index.z);
  if (run->fiber) {
    used += snprintf(run->launch.error + used, run->launch.error_size - used, ", thread %d", run->fiber->thread);
  }
  used += snprintf(run->launch.error + used, run->launch.error_size - used, ": ");
  vsnprintf(run->launch.error + used, run->launch.error_size - used, format, values);
}

// Does `fail` from the scheduler.
__attribute__((format(printf, 1, 2))) void report(const char* format, ...) {
  va_list values;
  va_start(values, format);
  record(format, values);
  va_end(values);
}

// The offset of code in the library, for the caller to find the line.
long offset_of(const void* code) {
  Dl_info library{};
  dladdr(code, &library);
  return (const char*)code - (const char*)library.dli_fbase;
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (!run || !run->fiber) {  // not the kernel's fault
    signal(number, SIG_DFL);
    return;
  }
#if defined(__x86_64__)
  void* code = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  void* code = (void*)((ucontext_t*)context)->uc_mcontext.pc;
#endif
  if (number == SIGSEGV || number == SIGBUS) fail("access to memory that is not its own, at <%lx>", offset_of(code));
  fail("misaligned access or other undefined behaviour at <%lx>", offset_of(code));
}

void access(const void* address, size_t size, bool writes, const void* code) {
  Block& block = *run->block;
  Fiber& fiber = *run->fiber;
  const char* name = "shared memory";
  Memory* memory = &block.shared_accesses;
  if (address >= shared_memory_area && address < shared_memory_area + sizeof(shared_memory_area)) {
    if (!memory->contains(address) || memory->offset(address) + (long)size > run->launch.shared) {
      fail("%s byte %ld of %d bytes of shared memory at <%lx>", writes ? "writes" : "reads",
           (long)((const char*)address - shared_memory), run->launch.shared, offset_of(code));
    }
  } else if (run->output.contains(address)) {
    memory = &run->output, name = "the output";
  } else if (run->scratch.contains(address)) {
    memory = &run->scratch, name = "the scratch";
  } else {
    return;
  }
  const Access now{true, block.number, fiber.thread / 32, fiber.thread, block.barriers, fiber.syncwarps, code};
  const auto [other, wrote] = memory->record(address, size, writes, now, fiber.knowledge, block.knowledge);
  if (other) {
    fail("%s byte %ld of %s at <%lx>, which another thread (%d of block %u) %s at <%lx>, in no certain order",
         writes ? "writes" : "reads", memory->offset(address), name, offset_of(code), other->thread, other->block,
         wrote ? "writes" : "reads", offset_of(other->code));
  }
}

int take(std::vector<int>& ready) {
  // Picks the thread that became ready last half of the time, so some threads run far ahead.
  const size_t choice = random_order() && coin() ? run->random() % ready.size() : ready.size() - 1;
  const int thread = ready[choice];
  ready.erase(ready.begin() + choice);
  return thread;
}

// Appends threads, given in increasing order, to the ready ones; the last ones run first.
void make_ready(Block& block, const std::vector<int>& threads) {
  for (int thread : threads) block.fibers[thread].state = State::kReady;
  if (run->launch.seed == -1) {
    block.ready.insert(block.ready.end(), threads.rbegin(), threads.rend());
  } else {
    block.ready.insert(block.ready.end(), threads.begin(), threads.end());
  }
}

const char* const kMeetings[] = {"__syncwarp",      "__shfl_sync",   "__shfl_up_sync", "__shfl_down_sync",
                                 "__shfl_xor_sync", "__ballot_sync", "__any_sync",     "__all_sync"};

void arrive_in_warp(Block& block, const Fiber& arrived) {
  const int first = arrived.thread / 32 * 32;
  unsigned& waiting = block.in_warp[arrived.thread / 32];
  waiting |= 1u << arrived.thread % 32;
  // Others may still arrive; otherwise the deadlock is found when nothing can run.
  if (arrived.mask & ~waiting) return;
  unsigned participants = 0;
  for (int lane = 0; lane < 32 && first + lane < (int)block.fibers.size(); lane++) {
    const Fiber& other = block.fibers[first + lane];
    if (!(arrived.mask >> lane & 1)) continue;
    if (!(other.mask >> arrived.thread % 32 & 1)) return;
    if (other.meeting != arrived.meeting || other.mask != arrived.mask || other.detail != arrived.detail) {
      report("lane %d is at %s with mask %08x in line %d, lane %d at %s with mask %08x in line %d", arrived.thread % 32,
             kMeetings[(int)arrived.meeting], arrived.mask, arrived.line, lane, kMeetings[(int)other.meeting],
             other.mask, other.line);
      return;
    }
    participants |= 1u << lane;
  }
  waiting &= ~participants;
  Exchange exchange{0, participants, 0};
  std::vector<int> threads;
  for (int lane = 0; lane < 32; lane++) {
    if (!(participants >> lane & 1)) continue;
    exchange.nonzero |= unsigned(block.fibers[first + lane].value != 0) << lane;
    threads.push_back(first + lane);
  }
  for (int thread : threads) {
    Fiber& fiber = block.fibers[thread];
    fiber.exchange = exchange;
    if (participants >> fiber.from & 1) fiber.exchange.value = block.fibers[first + fiber.from].value;
    // Of warp operations only __syncwarp orders memory, and here only with the whole warp.
    if (arrived.meeting == Meeting::kSyncwarp && arrived.mask == ~0u) fiber.syncwarps++;
  }
  make_ready(block, threads);
}

void arrive_at_barrier(Block& block) {
  block.at_barrier++;
  if (block.at_barrier < (int)block.fibers.size()) return;
  block.at_barrier = 0;
  if (++block.barriers > kMostBarriers) report("passes over %d __syncthreads, an endless loop", kMostBarriers);
  int count = 0;
  std::vector<int> threads;
  for (Fiber& fiber : block.fibers) {
    const Fiber& warp = block.fibers[fiber.thread / 32 * 32];
    if (fiber.barrier != block.fibers[0].barrier) report("threads meet at different kinds of __syncthreads");
    if (fiber.line != warp.line) {
      report("threads %d and %d of a warp meet at different __syncthreads, in lines %d and %d", warp.thread,
             fiber.thread, warp.line, fiber.line);
    }
    count += fiber.predicate;
    learn(block.knowledge, fiber.knowledge);
    fiber.knowledge.clear();
    threads.push_back(fiber.thread);
  }
  for (Fiber& fiber : block.fibers) fiber.count = count;
  make_ready(block, threads);
}

void start(Block& block, unsigned number) {
  block.number = number;
  block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  block.ready.clear();
  block.polling.clear();
  block.in_warp.assign((block.fibers.size() + 31) / 32, 0);
  if (block.fibers.size() % 32) block.in_warp.back() = ~0u << block.fibers.size() % 32;  // lanes that do not exist
  block.at_barrier = block.done = block.barriers = 0;
  std::vector<int> threads;
  for (Fiber& fiber : block.fibers) {
    fiber.knowledge.clear();
    threads.push_back(fiber.thread);
  }
  make_ready(block, threads);
  block.shared.assign(run->launch.shared, (char)kUnwritten);
  block.shared_accesses = Memory(shared_memory, run->launch.shared, 4);
  block.knowledge.clear();
  block.seen.clear();
}

void put_in_place(Block& block) {
  if (run->block == &block) return;
  if (run->block) memcpy(run->block->shared.data(), shared_memory, run->launch.shared);
  memcpy(shared_memory, block.shared.data(), run->launch.shared);
  run->block = &block;
  blockIdx = block.index;
}

void check_unwritten(const char* begin, const char* end) {
  if ((unsigned char)*begin == kUnwritten && !memcmp(begin, begin + 1, end - begin - 1)) return;
  while ((unsigned char)*begin == kUnwritten) begin++;
  report("wrote byte %ld of %d bytes of shared memory", (long)(begin - shared_memory), run->launch.shared);
}

void check_margins() {
  check_unwritten(shared_memory_area, shared_memory);
  check_unwritten(shared_memory + run->launch.shared, shared_memory_area + sizeof(shared_memory_area));
}

void explain_deadlock(Block& block) {
  const Fiber *in_warp = nullptr, *at_barrier = nullptr;
  int warps = 0;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kInWarp) in_warp = &fiber, warps++;
    if (fiber.state == State::kAtBarrier) at_barrier = &fiber;
  }
  char text[200] = "";
  int used = 0;
  if (at_barrier) {
    used = snprintf(text, sizeof(text), ", %d at a __syncthreads (thread %d in line %d)", block.at_barrier,
                    at_barrier->thread, at_barrier->line);
  }
  if (in_warp) {
    snprintf(text + used, sizeof(text) - used, ", %d in warps (thread %d at %s with mask %08x in line %d)", warps,
             in_warp->thread, kMeetings[(int)in_warp->meeting], in_warp->mask, in_warp->line);
  }
  report("deadlock: of %zu threads %d have returned%s", block.fibers.size(), block.done, text);
}

enum class Outcome { kDone, kWaitsForOthers, kNothingNew };

// Runs a block until it is done or waits for other blocks.
Outcome run_block(Block& block) {
  put_in_place(block);
  bool went_on = false;
  block.idle_rounds = 0;
  while (!run->failed) {
    if (block.ready.empty()) {
      if (block.done == (int)block.fibers.size()) {
        check_margins();
        return Outcome::kDone;
      }
      if (block.polling.empty()) {
        explain_deadlock(block);
        break;
      }
      if (++block.idle_rounds > kIdleRounds) return went_on ? Outcome::kWaitsForOthers : Outcome::kNothingNew;
      std::vector<int> threads;
      threads.swap(block.polling);
      make_ready(block, threads);
    }
    Fiber& fiber = block.fibers[take(block.ready)];
    resume(fiber);
    if (run->failed) break;
    if (fiber.state == State::kPolling) {
      block.polling.push_back(fiber.thread);
      continue;
    }
    block.idle_rounds = 0;
    went_on = true;
    if (fiber.state == State::kInWarp) arrive_in_warp(block, fiber);
    if (fiber.state == State::kAtBarrier) arrive_at_barrier(block);
    if (fiber.state == State::kDone) block.done++;
  }
  return Outcome::kDone;
}

void make_fibers(Block& block, int threads) {
  block.stacks = (char*)mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  block.fibers.resize(threads);
  for (int thread = 0; thread < threads; thread++) block.fibers[thread].thread = thread;
}

void run_grid(int threads) {
  const size_t total = (size_t)gridDim.x * gridDim.y * gridDim.z;
  const size_t at_a_time = run->launch.seed == -1 ? 1 : kBlocksAtATime;
  std::vector<Block> blocks(at_a_time < total ? at_a_time : total);
  for (Block& block : blocks) make_fibers(block, threads);
  std::vector<Block*> idle, active;
  for (Block& block : blocks) idle.push_back(&block);
  unsigned next = 0;
  size_t waiting = 0;  // consecutive blocks without progress
  while ((next < total || !active.empty()) && !run->failed) {
    while (next < total && !idle.empty()) {
      active.push_back(idle.back());
      idle.pop_back();
      start(*active.back(), next++);
    }
    const size_t choice = random_order() ? run->random() % active.size() : active.size() - 1 - waiting % active.size();
    Block* block = active[choice];
    const Outcome outcome = run_block(*block);
    waiting = outcome == Outcome::kNothingNew ? waiting + 1 : 0;
    if (waiting > kFruitless) report("waits for a value in memory that neither it nor a block before it writes");
    if (outcome == Outcome::kDone) {
      active.erase(active.begin() + choice);
      idle.push_back(block);
      run->block = nullptr;
    }
  }
  for (Block& block : blocks) munmap(block.stacks, threads * kStack);
}

}  // namespace

Exchange meet(Meeting meeting, unsigned mask, int detail, uint64_t value, int from, int line) {
  Fiber& fiber = *run->fiber;
  if (!(mask >> fiber.thread % 32 & 1)) {
    fail("%s in line %d with mask %08x, which leaves out the thread itself", kMeetings[(int)meeting], line, mask);
  }
  fiber.meeting = meeting;
  fiber.mask = mask;
  fiber.detail = detail;
  fiber.value = value;
  fiber.from = from;
  fiber.line = line;
  fiber.state = State::kInWarp;
  leave();
  return fiber.exchange;
}

int wait(Barrier barrier, bool predicate, int line) {
  Fiber& fiber = *run->fiber;
  fiber.barrier = barrier;
  fiber.predicate = predicate;
  fiber.line = line;
  fiber.state = State::kAtBarrier;
  leave();
  return fiber.count;
}

void poll() {
  run->fiber->state = State::kPolling;
  leave();
}

void progress() { run->block->idle_rounds = 0; }

int acquire(const int* address, bool learns) {
  poll();
  const std::vector<Release>& releases = run->releases[address];
  if (releases.empty()) return *address;
  // Returns the oldest value that a GPU may still see, and only its knowledge.
  size_t& seen = run->block->seen[address];
  const Release& release = releases[seen];
  if (seen + 1 < releases.size()) seen++;
  if (learns) learn(run->fiber->knowledge, release.knowledge);
  return release.value;
}

void release(int* address, int value) {
  progress();
  std::vector<Release>& releases = run->releases[address];
  if (releases.empty()) releases.push_back({*address, {}});
  Knowledge knowledge = run->fiber->knowledge;
  learn(knowledge, run->block->knowledge);
  knowledge[run->block->number] = run->block->barriers;
  releases.push_back({value, knowledge});
  *address = value;
}

void copy_later(void* target, const void* source, int size) {
  if ((uintptr_t)target % size || (uintptr_t)source % size) fail("misaligned copy of %d bytes", size);
  access(source, size, false, __builtin_return_address(0));
  access(target, size, true, __builtin_return_address(0));
  Copy copy{target, {}, size};
  memcpy(copy.bytes, source, size);
  if (run->launch.seed == -1 || (random_order() && coin())) {
    memcpy(target, copy.bytes, size);
  } else {
    run->fiber->copies.push_back(copy);
  }
}

void complete_copies() {
  for (const Copy& copy : run->fiber->copies) {
    access(copy.target, copy.size, true, __builtin_return_address(0));
    memcpy(copy.target, copy.bytes, copy.size);
  }
  run->fiber->copies.clear();
}

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  record(format, values);
  va_end(values);
  jump(run->scheduler);
}

bool execute(void (*kernel)(const void*), const Launch& launch) {
  Run current{kernel, launch, std::mt19937((unsigned)launch.seed),
              Memory(launch.output, launch.output_size, launch.output_element),
              Memory(launch.scratch, launch.scratch_size, 4)};
  run = &current;
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block, 1, 1};
  memset(shared_memory_area, kUnwritten, sizeof(shared_memory_area));

  static char signal_stack[1 << 16];
  const stack_t alternative{signal_stack, 0, sizeof(signal_stack)};
  stack_t stack_before;
  sigaltstack(&alternative, &stack_before);
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction action{}, before[5];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 5; i++) sigaction(signals[i], &action, &before[i]);

  run_grid(launch.block);

  for (int i = 0; i < 5; i++) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  run = nullptr;
  return !current.failed;
}

}  // namespace emulator

// With -fsanitize=thread the compiler calls these before every access to memory that threads may share.
#define EMULATOR_ACCESS(size)                                                                                  \
  void __tsan_read##size(void* p) { emulator::access(p, size, false, __builtin_return_address(0)); }           \
  void __tsan_write##size(void* p) { emulator::access(p, size, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##size(void* p) { emulator::access(p, size, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* p) { emulator::access(p, size, true, __builtin_return_address(0)); }
extern "C" {
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
void __tsan_read_range(void* p, size_t size) { emulator::access(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { emulator::access(p, size, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
