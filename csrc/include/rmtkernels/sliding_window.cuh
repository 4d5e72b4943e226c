// sliding_window, device code.
//
// A time step takes two kernels on one stream. The first decides for every sequence whether its new row is taken and
// says so in `seen`; the second acts on it. The kernel boundary is the only synchronisation between blocks: there is no
// atomic and no shared memory, and no block reads a ring row that another block of the same launch writes.
//
// Every dot product is the work of one warp, and its order of summation depends on the row length and type alone: not
// on alignment, strides, the launch shape, other sequences or other layers. Products go through fmaf, so that the
// compiler has no say in the rounding, and the norm that a row is judged by is, to the bit, its entry on the Gram's
// diagonal.
#pragma once

#include "rmtkernels/gpu.cuh"
#include "rmtkernels/pack.cuh"
#include "rmtkernels/scalar.h"
#include "rmtkernels/sliding_window.h"

#ifndef RMT_LAYERS_PER_LAUNCH
#define RMT_LAYERS_PER_LAUNCH 128  // tests set it to 2, to see what happens between launches
#endif

namespace rmtkernels {

constexpr int kAcceptThreads = 1024;  // at most: one warp per layer
constexpr int kPushThreads = 256;
constexpr int kPushWarps = kPushThreads / kWarpSize;  // one per ring slot
constexpr int kLayersPerLaunch = RMT_LAYERS_PER_LAUNCH;

// The new rows of one layer at one time step: element i of sequence b is data[b * batch_stride + i * dim_stride].
struct LayerRows {
  const void* data;
  int64_t batch_stride, dim_stride;
};

// Travels by value among the kernel parameters, of which every GPU takes 4 KB. More layers take more launches.
struct LayerChunk {
  LayerRows layer[kLayersPerLaunch];
};
static_assert(sizeof(LayerChunk) <= 3584, "leaves room for the other kernel parameters");

template <class T>
__device__ __forceinline__ bool allows_packs(const T* data, int64_t stride, int64_t dim) {
  return stride == 1 && dim % Pack<T>::kSize == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T>) == 0;
}

// Elements [first, first + kSize) of a row, zeros past its end. kPacked: allows_packs() holds, one load does it.
template <bool kPacked, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* data, int64_t stride, int64_t first, int64_t dim) {
  Pack<T> pack;
  if constexpr (kPacked) {
    const uint4 bits = *reinterpret_cast<const uint4*>(data + first);
    memcpy(&pack, &bits, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) pack.value[i] = first + i < dim ? data[(first + i) * stride] : T{};
  }
  return pack;
}

template <bool kPacked, class T>
__device__ __forceinline__ void store_pack(T* data, int64_t first, int64_t dim, const Pack<T>& pack) {
  if constexpr (kPacked) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(pack));
    *reinterpret_cast<uint4*>(data + first) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i)
      if (first + i < dim) data[first + i] = pack.value[i];
  }
}

// One lane's share of a dot product: a sum of its own for each place in a pack.
template <class T>
struct LaneSums {
  float sum[Pack<T>::kSize] = {};

  __device__ __forceinline__ void add(const Pack<T>& a, const Pack<T>& b) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) sum[i] = fmaf(to_float(a.value[i]), to_float(b.value[i]), sum[i]);
  }

  __device__ __forceinline__ float over_warp() {
#pragma unroll
    for (int half = Pack<T>::kSize / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return warp_sum(sum[0]);
  }
};

// Squared norm of a row, by one warp.
template <bool kPacked, class T>
__device__ float warp_squared_norm(const T* row, int64_t stride, int64_t dim, int lane) {
  LaneSums<T> sums;
#pragma unroll(kPacked ? 4 : 1)
  for (int64_t first = int64_t(lane) * Pack<T>::kSize; first < dim; first += kWarpSize * Pack<T>::kSize) {
    const Pack<T> pack = load_pack<kPacked>(row, stride, first, dim);
    sums.add(pack, pack);
  }
  return sums.over_warp();
}

// Dot product of the new row with a ring row, by one warp. kStore: the ring row is the new row's own slot. It is
// written from the registers that the product takes it from, and never read back.
template <bool kPackedRow, bool kPackedRing, bool kStore, class T>
__device__ float warp_push_dot(const T* row, int64_t stride, T* ring_row, int64_t dim, int lane) {
  LaneSums<T> sums;
#pragma unroll(kPackedRow ? 4 : 1)
  for (int64_t first = int64_t(lane) * Pack<T>::kSize; first < dim; first += kWarpSize * Pack<T>::kSize) {
    const Pack<T> a = load_pack<kPackedRow>(row, stride, first, dim);
    if constexpr (kStore) {
      store_pack<kPackedRing>(ring_row, first, dim, a);
      sums.add(a, a);
    } else {
      sums.add(a, load_pack<kPackedRing>(static_cast<const T*>(ring_row), 1, first, dim));
    }
  }
  return sums.over_warp();
}

template <bool kPackedRow, bool kPackedRing, class T>
__device__ float warp_push(const T* row, int64_t stride, T* ring_row, int64_t dim, int lane, bool store) {
  return store ? warp_push_dot<kPackedRow, kPackedRing, true>(row, stride, ring_row, dim, lane)
               : warp_push_dot<kPackedRow, kPackedRing, false>(row, stride, ring_row, dim, lane);
}

// Decides whether the new row of each sequence is taken.
//
//   accepted(b) = unmasked(b) and for every layer l: |row(l, b)|^2 is finite in float32
//
// Shapes: row (D,) for each layer and sequence, mask (B,) or null, seen (B, 3). Grid (B), one block per sequence, one
// warp per layer of the chunk. Reads L * D elements per sequence once, writes 24 bytes.
//
// The layers may come in several launches. Until the last, `slot` >= 0 means that no layer has objected so far; a
// launch that finds -1 there has nothing to add, and only the last counts the row.
template <class T>
__global__ void __launch_bounds__(kAcceptThreads)
    window_push_accept_kernel(const LayerChunk chunk, int layers, int64_t dim, int64_t window, const bool* mask,
                              int64_t mask_stride, int64_t* seen, bool first_chunk, bool last_chunk) {
  const int64_t sequence = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  int64_t* counters = seen + sequence * kSeenColumns;

  if (!first_chunk && counters[kSeenSlot] < 0) return;
  if (first_chunk && mask != nullptr && !mask[sequence * mask_stride]) {
    if (threadIdx.x == 0) counters[kSeenSlot] = -1;
    return;
  }

  bool finite = true;
  for (int l = warp; l < layers; l += warps) {
    const int64_t stride = chunk.layer[l].dim_stride;
    const T* row = static_cast<const T*>(chunk.layer[l].data) + sequence * chunk.layer[l].batch_stride;
    const float norm = allows_packs(row, stride, dim) ? warp_squared_norm<true>(row, stride, dim, lane)
                                                      : warp_squared_norm<false>(row, stride, dim, lane);
    finite = finite && norm_is_finite(norm);
  }
  const bool accepted = __syncthreads_and(finite);

  if (threadIdx.x != 0) return;
  if (!accepted) {
    counters[kSeenRejected] += 1;
    counters[kSeenSlot] = -1;
  } else {
    counters[kSeenSlot] = window_slot(counters[kSeenRows], window);
    if (last_chunk) counters[kSeenRows] += 1;
  }
}

// Puts the new row into its slot s of the ring and refreshes row and column s of the Gram matrix.
//
//   ring(s) = row,   gram(s, j) = gram(j, s) = <row, ring(j)>   for every slot j in use
//
// Shapes: ring (L, B, N, D), gram (L, B, N, N), seen (B, 3). Grid (B * ceil(N / kPushWarps), L): a block owns
// kPushWarps slots of one stream, a warp owns one slot, writes ring(s) if that is its slot, and the two Gram entries
// that belong to it. Per stream it moves (rows in use - 1) ring rows in, one row out and 2 N floats out; the new row is
// read by every warp, from memory once and from the caches after that.
template <class T>
__global__ void __launch_bounds__(kPushThreads)
    window_push_kernel(const LayerChunk chunk, T* ring, float* gram, const int64_t* seen, int64_t batch, int64_t window,
                       int64_t dim, unsigned blocks_per_stream) {
  const int64_t sequence = blockIdx.x / blocks_per_stream;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t j = int64_t(blockIdx.x % blocks_per_stream) * kPushWarps + threadIdx.x / kWarpSize;
  const int64_t slot = seen[sequence * kSeenColumns + kSeenSlot];
  if (slot < 0 || j >= window_rows(seen[sequence * kSeenColumns + kSeenRows], window)) return;

  const LayerRows& layer = chunk.layer[blockIdx.y];
  const int64_t stride = layer.dim_stride, stream = blockIdx.y * batch + sequence;
  const T* row = static_cast<const T*>(layer.data) + sequence * layer.batch_stride;
  T* ring_row = ring + (stream * window + j) * dim;
  const bool store = j == slot;

  float dot;
  if (!allows_packs(ring, 1, dim)) {
    dot = warp_push<false, false>(row, stride, ring_row, dim, lane, store);
  } else if (!allows_packs(row, stride, dim)) {
    dot = warp_push<false, true>(row, stride, ring_row, dim, lane, store);
  } else {
    dot = warp_push<true, true>(row, stride, ring_row, dim, lane, store);
  }
  if (lane == 0) {
    float* stream_gram = gram + stream * window * window;
    stream_gram[slot * window + j] = dot;
    stream_gram[j * window + slot] = dot;
  }
}

}  // namespace rmtkernels
