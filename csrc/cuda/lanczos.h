// Plain launcher of the lanczos kernels: raw device pointers, sizes, a stream. No torch, no CUDA header.
#pragma once

#include <cstdint>

namespace rmtkernels {

// Rows to be made orthonormal, and orthogonal to an orthonormal basis: rows = products basis + triangleᵀ unit.
// Everything is contiguous; rows, basis, noise and unit are float32, or all float64.
struct LanczosRows {
  const void* rows;   // (count, dim)
  const void* basis;  // (size, dim)
  const void* noise;  // (count, dim): random rows of norm about 1, of use `shift` columns further on, round the end
  const double* negligible;  // one number: a row of which no more is new gives way to a random one
  void* unit;                // (count, dim), or as many as there is room for beside the basis: (dim - size, dim)
  double* triangle;          // (count, count), zeros before
  double* products;          // (count, size)
  double* workspace;         // rmtkernels_cuda_lanczos_workspace(...) numbers
  int64_t count, size, dim;
  int64_t shift;  // 0 to dim - 1
  bool is_double;
};

// Numbers that the workspace holds.
extern "C" int64_t rmtkernels_cuda_lanczos_workspace(int64_t count, int64_t size, int64_t dim);

// Queues nine to fifteen kernels for every eight rows on `stream`, a cudaStream_t of the current device. Returns a
// cudaError_t. Allocates nothing, waits for nothing, can be captured in a CUDA graph. Calls on several streams need a
// workspace each.
extern "C" int rmtkernels_cuda_lanczos_orthonormalize(const LanczosRows* rows, void* stream);

}  // namespace rmtkernels
