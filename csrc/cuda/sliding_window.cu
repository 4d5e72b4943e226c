// Launch shapes of the sliding_window kernels.
#include <algorithm>

#include "cuda/arena.h"
#include "cuda/sliding_window.h"
#include "rmtkernels/sliding_window.cuh"
#include "rmtkernels/sliding_window_gram.cuh"

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

constexpr int64_t kMostBlocksX = (int64_t(1) << 31) - 1, kMostBlocksY = 65535;

int64_t gram_splits(int64_t dim) { return std::max<int64_t>(1, ceil_div(dim, kSplitDim)); }

GramWork take_gram_work(Arena& arena, int64_t batch, int64_t steps, int64_t dim, int64_t window) {
  GramWork work{};
  work.taken = arena.take<bool>(batch * steps);
  work.offset = arena.take<int64_t>(batch * steps);
  work.accepted = arena.take<int64_t>(batch * steps);
  work.sums = arena.take<float>(gram_splits(dim) * batch * steps * window);
  work.band = arena.take<float>(batch * steps * 2 * window);
  return work;
}

int64_t accept_blocks(const GramRows& rows) { return ceil_div(rows.batch * rows.steps, kAcceptRowThreads / kWarpSize); }
int64_t gram_tiles(const GramRows& rows) { return rows.batch * ceil_div(rows.steps, kTileRows); }

template <class X, int kWindow>
void multiply_rows(const GramRows& rows, const GramWork& work, cudaStream_t stream) {
  RMT_LAUNCH((window_gram_products_kernel<X, kWindow>),
             dim3(unsigned(gram_tiles(rows)), unsigned(gram_splits(rows.dim))), dim3(kTileThreads), 0, stream, rows,
             work);
}

// As many blocks as a grid has, if there is work for them.
dim3 copy_grid(int64_t blocks) { return dim3(unsigned(std::min(blocks, kMostBlocksX))); }

template <class X>
cudaError_t gram_of_windows(const WindowGram& call, const GramWork& work, cudaStream_t stream) {
  const GramRows& rows = call.rows;
  RMT_LAUNCH((window_gram_accept_kernel<X>), dim3(unsigned(accept_blocks(rows))), dim3(kAcceptRowThreads), 0, stream,
             rows, work);
  RMT_LAUNCH(window_gram_list_kernel, dim3(unsigned(rows.batch)), dim3(kListThreads), 0, stream, rows, work);
  if (rows.window <= 32)
    multiply_rows<X, 32>(rows, work, stream);
  else if (rows.window <= 64)
    multiply_rows<X, 64>(rows, work, stream);
  else
    multiply_rows<X, 128>(rows, work, stream);
  RMT_LAUNCH(window_gram_band_kernel,
             copy_grid(ceil_div(rows.batch * rows.steps, kCopyThreads / copy_width(rows.window))), dim3(kCopyThreads),
             0, stream, rows, work);
  RMT_LAUNCH(window_gram_windows_kernel, copy_grid(rows.batch * (rows.steps / call.stride)), dim3(kCopyThreads), 0,
             stream, rows, work, call.stride, call.gram, call.seen);
  return cudaGetLastError();
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

int64_t rmtkernels_cuda_window_gram_workspace(int64_t batch, int64_t steps, int64_t dim, int64_t window) {
  Arena arena(nullptr);
  take_gram_work(arena, batch, steps, dim, window);
  return arena.used();
}

int rmtkernels_cuda_window_gram(const WindowGram* call, void* stream) {
  const GramRows& rows = call->rows;
  if (rows.batch == 0 || rows.steps < call->stride) return cudaSuccess;  // no window
  constexpr int64_t kMostRows = kMostBlocksX * (kAcceptRowThreads / kWarpSize);
  if (rows.steps > kMostRows / rows.batch || gram_tiles(rows) > kMostBlocksX || gram_splits(rows.dim) > kMostBlocksY)
    return cudaErrorInvalidConfiguration;
  Arena arena(call->workspace);
  const GramWork work = take_gram_work(arena, rows.batch, rows.steps, rows.dim, rows.window);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (call->type) {
    case RowType::kFloat32:
      return gram_of_windows<float>(*call, work, queue);
    case RowType::kBFloat16:
      return gram_of_windows<bfloat16>(*call, work, queue);
    case RowType::kFloat16:
      return gram_of_windows<float16>(*call, work, queue);
  }
  return cudaErrorInvalidValue;
}

}  // namespace rmtkernels
