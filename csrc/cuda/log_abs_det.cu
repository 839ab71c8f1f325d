// Log-determinants, one an image: the log-diagonal summed over channels and pixels, negative for a solution.
//
// `first` is the log-diagonal as images [B, C, H, W] whose pixels are all alike; their strides tell whether the images
// are, too. A warp adds up the channels of one image, in a fixed order. It takes as long as a launch.
//
// Arguments: parameters[0] = channels; offsets[0] = pixels, negative for a solution. No constant depends on a size.
#include "arguments.cuh"

extern "C" __global__ void __launch_bounds__(32) log_abs_det(const __grid_constant__ Arguments arguments) {
  const SCALAR* from = static_cast<const SCALAR*>(arguments.first) + blockIdx.x * arguments.first_strides[0];
  Accumulator sum = 0;
  for (int c = threadIdx.x; c < arguments.parameters[0]; c += 32) sum += load(from + c * arguments.first_strides[1]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x == 0) static_cast<Accumulator*>(arguments.output)[blockIdx.x] = sum * arguments.offsets[0];
}
