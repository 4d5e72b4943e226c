#include "cuda/runtime.h"
#include "rmtkernels/gpu.cuh"

namespace rmtkernels {
namespace {

__global__ void empty_kernel() {}

}  // namespace

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_probe_launch() {
  RMT_LAUNCH(empty_kernel, dim3(1), dim3(kWarpSize), 0, nullptr);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace rmtkernels
