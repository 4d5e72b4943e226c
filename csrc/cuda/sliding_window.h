// Plain launcher of the sliding_window kernels: raw device pointers, sizes, a stream. No torch, no CUDA header.
#pragma once

#include "rmtkernels/sliding_window.h"

namespace rmtkernels {

enum class RowType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows offered at one layer: element i at step t of sequence b is data[b * batch_stride + t * step_stride + i *
// dim_stride].
struct OfferedRows {
  const void* data;
  int64_t batch_stride, step_stride, dim_stride;
};

struct WindowPush {
  void* ring;               // (layers, batch, window, dim), contiguous
  float* gram;              // (layers, batch, window, window), contiguous
  int64_t* seen;            // (batch, kSeenColumns), contiguous
  const OfferedRows* rows;  // host array, one entry per layer; read before the launcher returns
  const bool* mask;         // null: every row is offered
  int64_t mask_batch_stride, mask_step_stride;
  int64_t layers, batch, steps, window, dim;
  RowType type;
};

// Queues two kernels per step (and per 128 layers) on `stream`, a cudaStream_t of the current device. Returns a
// cudaError_t. Allocates nothing, waits for nothing, can be captured in a CUDA graph.
extern "C" int rmtkernels_cuda_window_push(const WindowPush* push, void* stream);

// The windows of whole sequences.
struct WindowGram {
  GramRows rows;
  float* gram;      // (batch, steps / stride, window, window), contiguous
  int64_t* seen;    // (batch, steps / stride), contiguous
  void* workspace;  // rmtkernels_cuda_window_gram_workspace bytes on a multiple of 16; what it held is lost
  int64_t stride;
  RowType type;
};

// Bytes of memory that a call of these sizes works in: of each row `window` floats for every 512 elements and twice as
// many at the end, and 17 bytes.
extern "C" int64_t rmtkernels_cuda_window_gram_workspace(int64_t batch, int64_t steps, int64_t dim, int64_t window);

// Queues five kernels on `stream`, a cudaStream_t of the current device. Returns a cudaError_t. Allocates nothing,
// waits for nothing, can be captured in a CUDA graph. Calls on several streams need a workspace each.
extern "C" int rmtkernels_cuda_window_gram(const WindowGram* call, void* stream);

}  // namespace rmtkernels
