// Bugs that the checkers must find, one per case, and code that they must not complain about. Usage: planted_bugs CASE.
// Exits with 0 if the results are right, which they are in most cases: that is why checkers are needed.
#include <cstring>

#include "rmtkernels/gpu.cuh"

namespace {

constexpr int kThreads = 64;

// Right when threads run in order, which is how a missing barrier passes a test.
__global__ void missing_syncthreads(int* out) {
  RMT_SHARED int shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = t;
  out[t] = shared[t > 0 ? t - 1 : 0] == (t > 0 ? t - 1 : 0);
}

// Right in every order: the shuffle happens to make the lanes wait, but it orders no memory.
__global__ void missing_syncwarp(int* out) {
  RMT_SHARED int shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = t;
  const int lane = __shfl_sync(rmtkernels::kAllLanes, t, t) % rmtkernels::kWarpSize;
  const int opposite = t - lane + (rmtkernels::kWarpSize - 1 - lane);
  out[t] = shared[opposite] == opposite;
}

__global__ void racing_blocks(int* out) { out[threadIdx.x] = out[threadIdx.x] + 1; }

__global__ void correct(int* out) {
  RMT_SHARED int shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = t;
  __syncthreads();
  const bool across_block = shared[kThreads - 1 - t] == kThreads - 1 - t;
  __syncthreads();
  shared[t] = 2 * t;
  __syncwarp();
  atomicAdd(&out[t], int(across_block && shared[t ^ 1] == 2 * (t ^ 1)));
}

__global__ void divergent_syncthreads(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exit_before_syncthreads(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void shuffle_of_half_a_warp(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x % rmtkernels::kWarpSize < 16) __shfl_xor_sync(rmtkernels::kAllLanes, 1, 1);
}

__global__ void shuffle_from_outside_the_mask(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

// What a kernel written for 32 lanes does on a wavefront of 64.
__global__ void mask_of_32_lanes(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1); }

__global__ void static_overrun(int* out) {
  RMT_SHARED int shared[kThreads];
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void dynamic_overrun(int* out) {
  RMT_DYN_SHARED(int, shared);
  shared[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void unwritten_shared(int* out) {
  RMT_DYN_SHARED(float, shared);
  if (threadIdx.x > 0) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x] == 1;
}

struct Case {
  const char* name;
  void (*kernel)(int*);
  unsigned blocks;
  size_t shared = kThreads * sizeof(int);
};

const Case kCases[] = {{"missing_syncthreads", missing_syncthreads, 1},
                       {"missing_syncwarp", missing_syncwarp, 1},
                       {"racing_blocks", racing_blocks, 64},
                       {"correct", correct, 64},
                       {"divergent_syncthreads", divergent_syncthreads, 1},
                       {"exit_before_syncthreads", exit_before_syncthreads, 1},
                       {"shuffle_of_half_a_warp", shuffle_of_half_a_warp, 1},
                       {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask, 1},
                       {"mask_of_32_lanes", mask_of_32_lanes, 1},
                       {"static_overrun", static_overrun, 1},
                       {"dynamic_overrun", dynamic_overrun, 1},
                       {"unwritten_shared", unwritten_shared, 1},
                       {"empty_grid", correct, 0},
                       {"more_shared_than_asked_for", correct, 1, 49 * 1024}};

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases) {
    if (argc != 2 || std::strcmp(argv[1], c.name) != 0) continue;
    int out[kThreads] = {};
    RMT_LAUNCH(c.kernel, dim3(c.blocks), dim3(kThreads), c.shared, nullptr, out);
    if (cudaGetLastError() != cudaSuccess) return 3;
    const int expected = c.kernel == correct || c.kernel == racing_blocks ? int(c.blocks) : 1;
    for (int value : out)
      if (value != expected) return 1;
    return 0;
  }
  return 2;
}
