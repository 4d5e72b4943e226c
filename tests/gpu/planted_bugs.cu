// One bug for each tool of compute-sanitizer, which the tool must find, or it has not checked anything:
// planted_bugs memcheck|racecheck|synccheck|initcheck.
#include <cuda_runtime.h>

#include <cstring>

namespace {

constexpr int kThreads = 64;

__global__ void writes_past_the_end(int* x) { x[kThreads + threadIdx.x] = 1; }

__global__ void misses_a_barrier(int* x) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = int(threadIdx.x);
  x[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void waits_in_a_branch(int* x) {
  if (threadIdx.x < 16) __syncthreads();
  x[threadIdx.x] = 1;
}

__global__ void reads_what_nobody_wrote(int* x) { x[threadIdx.x] += 1; }

struct Bug {
  const char* tool;
  void (*kernel)(int*);
};

constexpr Bug kBugs[] = {{"memcheck", writes_past_the_end},
                         {"racecheck", misses_a_barrier},
                         {"synccheck", waits_in_a_branch},
                         {"initcheck", reads_what_nobody_wrote}};

}  // namespace

int main(int count, char** arguments) {
  int* x = nullptr;
  if (cudaMalloc(&x, kThreads * sizeof(int)) != cudaSuccess) return 2;
  for (const Bug& bug : kBugs)
    if (count == 2 && std::strcmp(arguments[1], bug.tool) == 0) {
      bug.kernel<<<1, kThreads>>>(x);
      cudaDeviceSynchronize();
      return 0;
    }
  return 3;
}
