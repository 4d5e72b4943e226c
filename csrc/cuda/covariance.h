// Plain launcher of the covariance kernels: raw device pointers, sizes, a stream. No torch, no CUDA header.
#pragma once

#include <cstdint>

namespace rmtkernels {

enum class SampleType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// One update. Element (i, j) of the batch is batch[i * row_stride + j].
struct CovarianceUpdate {
  double* mean;         // (dim,)
  void* scatter;        // (dim, dim), contiguous; the strict upper triangle is neither read nor written
  double* totals;       // (kCovarianceTotals,)
  const void* batch;    // (rows, dim)
  const void* weights;  // (rows,) with weight_stride, float or double; null: 1
  const bool* mask;     // (rows,) with mask_stride; null: every row is offered
  void* workspace;      // rmtkernels_cuda_covariance_workspace bytes on a multiple of 16; what it held is lost
  int64_t rows, dim, row_stride, weight_stride, mask_stride;
  double decay;
  SampleType type;
  bool scatter_is_double, weights_are_double;
};

// Bytes of memory that an update of these sizes works in.
extern "C" int64_t rmtkernels_cuda_covariance_workspace(int64_t rows, int64_t dim, bool scatter_is_double);

// Queues six or seven kernels on `stream`, a cudaStream_t of the current device. Returns a cudaError_t. Allocates
// nothing, waits for nothing, can be captured in a CUDA graph. Calls on several streams need a workspace each.
//
// What depends on the data cannot be refused without waiting for it: where a weight is not finite or negative, the sums
// would overflow or the state is not finite, all rows that were offered are counted as rejected, and nothing else
// changes.
extern "C" int rmtkernels_cuda_covariance_update(const CovarianceUpdate* update, void* stream);

}  // namespace rmtkernels
