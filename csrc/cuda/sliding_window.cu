// Launch shapes of the sliding_window kernels.
#include <algorithm>

#include "cuda/sliding_window.h"
#include "rmtkernels/sliding_window.cuh"

namespace rmtkernels {
namespace {

LayerChunk chunk_at(const WindowPush& push, int64_t step, int64_t first_layer, int64_t layers, size_t element_size) {
  LayerChunk chunk{};
  for (int64_t l = 0; l < layers; ++l) {
    const OfferedRows& rows = push.rows[first_layer + l];
    const char* data = static_cast<const char*>(rows.data) + step * rows.step_stride * int64_t(element_size);
    chunk.layer[l] = {data, rows.batch_stride, rows.dim_stride};
  }
  return chunk;
}

template <class T>
cudaError_t accept_layers(const WindowPush& push, int64_t step, int64_t first_layer, int layers, cudaStream_t stream) {
  const bool* mask = push.mask == nullptr ? nullptr : push.mask + step * push.mask_step_stride;
  const bool first_chunk = first_layer == 0, last_chunk = first_layer + layers == push.layers;
  RMT_LAUNCH((window_push_accept_kernel<T>), dim3(unsigned(push.batch)),
             dim3(std::min(layers * kWarpSize, kAcceptThreads)), 0, stream,
             chunk_at(push, step, first_layer, layers, sizeof(T)), layers, push.dim, push.window, mask,
             push.mask_batch_stride, push.seen, first_chunk, last_chunk);
  return cudaGetLastError();
}

template <class T>
cudaError_t push_layers(const WindowPush& push, int64_t step, int64_t first_layer, int layers, cudaStream_t stream) {
  const unsigned blocks_per_stream = unsigned((push.window + kPushWarps - 1) / kPushWarps);
  const int64_t first_slot = first_layer * push.batch * push.window;
  RMT_LAUNCH((window_push_kernel<T>), dim3(unsigned(push.batch) * blocks_per_stream, unsigned(layers)),
             dim3(kPushThreads), 0, stream, chunk_at(push, step, first_layer, layers, sizeof(T)),
             static_cast<T*>(push.ring) + first_slot * push.dim, push.gram + first_slot * push.window, push.seen,
             push.batch, push.window, push.dim, blocks_per_stream);
  return cudaGetLastError();
}

// All layers have their say before any of them is written.
template <class T>
cudaError_t push_step(const WindowPush& push, int64_t step, cudaStream_t stream) {
  for (auto launch : {accept_layers<T>, push_layers<T>}) {
    for (int64_t first = 0; first < push.layers; first += kLayersPerLaunch) {
      const int layers = int(std::min<int64_t>(kLayersPerLaunch, push.layers - first));
      const cudaError_t error = launch(push, step, first, layers, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t push_step(const WindowPush& push, int64_t step, cudaStream_t stream) {
  switch (push.type) {
    case RowType::kFloat32:
      return push_step<float>(push, step, stream);
    case RowType::kBFloat16:
      return push_step<bfloat16>(push, step, stream);
    case RowType::kFloat16:
      return push_step<float16>(push, step, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int rmtkernels_cuda_window_push(const WindowPush* push, void* stream) {
  constexpr int64_t kMostBatch = (int64_t(1) << 31) / 128;  // the grid's first dimension holds it for every window
  if (push->batch > kMostBatch) return cudaErrorInvalidConfiguration;
  if (push->batch == 0 || push->window == 0) return cudaSuccess;
  for (int64_t step = 0; step < push->steps; ++step) {
    const cudaError_t error = push_step(*push, step, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rmtkernels
