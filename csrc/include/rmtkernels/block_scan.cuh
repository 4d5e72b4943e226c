// A sum over the threads of a block that come before.
#pragma once

#include "rmtkernels/gpu.cuh"

namespace rmtkernels {

// Sum of `mine` over the threads before this one, for all kThreads of a block at once. `room`: a count per warp, free
// after the next barrier. *all: the sum over the block.
template <int kThreads>
__device__ __forceinline__ int exclusive_sum(int mine, int* room, int* all) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int before = mine;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == kWarpSize - 1) room[warp] = before;
  __syncthreads();
  *all = 0;
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    if (w == warp) before += *all;
    *all += room[w];
  }
  return before - mine;
}

}  // namespace rmtkernels
