// Plain launcher of the lowrank_linear kernels: raw device pointers, sizes, a stream. No torch, no CUDA header.
#pragma once

#include "rmtkernels/scalar.h"

namespace rmtkernels {

// Everything is contiguous.
struct LowrankLinear {
  const void* x;     // (rows, d_in)
  const void* down;  // (k, d_in)
  const void* up;    // (d_out, k) of down's type
  const void* bias;  // (d_out,) of down's type, or null
  void* out;         // (rows, d_out) of x's type
  float* hidden;     // (rows, k), for x downᵀ; what it held is lost
  int64_t rows, d_in, k, d_out;
  ElementType type, weight_type;  // of x, of the weights: both float16, or neither
};

// Queues two kernels on `stream`, a cudaStream_t of the current device. Returns a cudaError_t. Allocates nothing, waits
// for nothing, can be captured in a CUDA graph. Calls on several streams need a `hidden` each.
extern "C" int rmtkernels_cuda_lowrank_linear(const LowrankLinear* layer, void* stream);

}  // namespace rmtkernels
