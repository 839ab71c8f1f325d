// Chains of dependent instructions for calibration.py.
//
// The count is known only at run time, so each chain stays a separate loop between both clocks.
struct Arguments {
  long long* result;         // cycles, nanoseconds, and the result of the chain
  unsigned long long chain;  // address of an address of an address ...
  int count;                 // a multiple of kUnrolled
  float factor;
};

constexpr int kUnrolled = 128;

__device__ inline long long nanoseconds() {
  long long time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

template <typename Value, typename Step>
__device__ inline void measure(const Arguments& arguments, Value value, Step step) {
  const long long first_time = nanoseconds(), first_cycle = clock64();
#pragma unroll 1
  for (int i = 0; i < arguments.count; i += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled; ++j) step(value);
  }
  const long long cycles = clock64() - first_cycle, time = nanoseconds() - first_time;
  if (threadIdx.x == 0) {
    arguments.result[0] = cycles;
    arguments.result[1] = time;
    arguments.result[2] = value;
  }
}

extern "C" __global__ void multiply_add(const __grid_constant__ Arguments arguments) {
  const float factor = arguments.factor;
  measure(arguments, factor, [=](float& value) { value = value * factor + factor; });
}

extern "C" __global__ void shuffle(const __grid_constant__ Arguments arguments) {
  const float own = arguments.factor * threadIdx.x;  // lanes differ, so the compiler keeps the shuffles
  measure(arguments, own, [](float& value) { value = __shfl_xor_sync(~0u, value, 1); });
}

extern "C" __global__ void barrier(const __grid_constant__ Arguments arguments) {
  measure(arguments, 0, [](int&) { __syncthreads(); });
}

extern "C" __global__ void shared_load(const __grid_constant__ Arguments arguments) {
  extern __shared__ unsigned memory[];
  const unsigned address = __cvta_generic_to_shared(memory);
  memory[0] = address;
  measure(arguments, address, [](unsigned& value) { asm volatile("ld.shared.u32 %0, [%0];" : "+r"(value)); });
}

extern "C" __global__ void cached_load(const __grid_constant__ Arguments arguments) {
  measure(arguments, arguments.chain, [](unsigned long long& value) {
    asm volatile("ld.global.ca.u64 %0, [%0];" : "+l"(value));
  });
}

// Bypasses the L1 cache: loads from L2, or from memory if the chain exceeds L2.
extern "C" __global__ void load(const __grid_constant__ Arguments arguments) {
  measure(arguments, arguments.chain, [](unsigned long long& value) {
    asm volatile("ld.global.cg.u64 %0, [%0];" : "+l"(value));
  });
}

extern "C" __global__ void nothing(const __grid_constant__ Arguments) {}
