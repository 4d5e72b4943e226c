// Plain launcher of the sliding_window kernels: raw device pointers, sizes, a stream. No torch, no CUDA header.
#pragma once

#include <cstdint>

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

}  // namespace rmtkernels
