// sliding_window, device code: the Gram matrices of all windows of whole sequences. Status: compiled and emulated,
// never run on a GPU.
//
// Five kernels on one stream: accept (a warp per row: is it taken?), list (a block per sequence: where the accepted
// rows lie), products (the inner products of the list's band, tile by tile), band (their sums, both ways round),
// windows (each copies its matrix out of the band). The kernel boundary is the only synchronisation between blocks; no
// atomics.
//
//   band(i, j) = <row i, row j>,  |i - j| < N,  of the accepted rows, counted from 0
//
// Each is computed once, whatever the number of windows that hold it. A row is judged by the bits that window_push_
// judges it by. Products are summed in float32 over kSplitDim elements of the rows and then in float64; the order
// depends on their width and type alone: rows have the same products in any batch, at any address and in any run, and
// equal rows the same as one another.
#pragma once

#include "rmtkernels/block_scan.cuh"
#include "rmtkernels/sliding_window.cuh"
#include "rmtkernels/tensor_core.cuh"

namespace rmtkernels {

constexpr int kAcceptRowThreads = 256;
constexpr int kListThreads = 512;
constexpr int kRowsPerLister = 8;  // rows that a thread of the list kernel looks at in one step
constexpr int kStripRows = 16;     // of a tile, the work of 32 threads
constexpr int kTileRows = 64;
constexpr int kTileThreads = kTileRows / kStripRows * kMmaLanes;
constexpr int64_t kSplitDim = 512;  // elements of a row that are summed in float32
constexpr int kSliceBytes = 64;     // of each row in shared memory
constexpr int kCopyThreads = 128;
constexpr float kLargestFloat = 3.40282347e38f;

template <class X>
constexpr int kSliceDim = kSliceBytes / int(sizeof(X));

// Working memory of one call.
struct GramWork {
  bool* taken;        // (batch, steps)
  int64_t* offset;    // (batch, steps) where the accepted rows begin in their sequence, in elements
  int64_t* accepted;  // (batch, steps) rows accepted so far, this one included
  float* sums;        // (splits, batch, steps, window): of <row i, row i - k>, the part of one split
  float* band;        // (batch, steps, 2 window): of row i with row i + k at window - 1 + k
};

// Grid: a warp per row.
template <class X>
__global__ void __launch_bounds__(kAcceptRowThreads)
    window_gram_accept_kernel(const GramRows rows, const GramWork work) {
  const int64_t place = int64_t(blockIdx.x) * (kAcceptRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (place >= rows.batch * rows.steps) return;
  const int64_t b = place / rows.steps, t = place % rows.steps, stride = rows.dim_stride;
  const int lane = threadIdx.x % kWarpSize;
  bool taken = rows.mask == nullptr || rows.mask[b * rows.mask_batch_stride + t * rows.mask_step_stride];
  if (taken) {
    const X* const row = static_cast<const X*>(rows.data) + b * rows.batch_stride + t * rows.step_stride;
    taken = norm_is_finite(allows_packs(row, stride, rows.dim) ? warp_squared_norm<true>(row, stride, rows.dim, lane)
                                                               : warp_squared_norm<false>(row, stride, rows.dim, lane));
  }
  if (lane == 0) work.taken[place] = taken;
}

// Grid (batch): lists the accepted rows of a sequence in their order.
__global__ void __launch_bounds__(kListThreads) window_gram_list_kernel(const GramRows rows, const GramWork work) {
  RMT_SHARED int counts[2][kListThreads / kWarpSize];
  const int64_t sequence = int64_t(blockIdx.x) * rows.steps;
  int64_t listed = 0;
  int turn = 0;
  for (int64_t first = 0; first < rows.steps; first += kListThreads * kRowsPerLister, turn ^= 1) {
    const int64_t own = first + int64_t(threadIdx.x) * kRowsPerLister;
    bool taken[kRowsPerLister];
    int mine = 0, all;
#pragma unroll
    for (int i = 0; i < kRowsPerLister; ++i) {
      taken[i] = own + i < rows.steps && work.taken[sequence + own + i];
      mine += taken[i];
    }
    int64_t place = listed + exclusive_sum<kListThreads>(mine, counts[turn], &all);
#pragma unroll
    for (int i = 0; i < kRowsPerLister; ++i) {
      if (taken[i]) work.offset[sequence + place++] = (own + i) * rows.step_stride;
      if (own + i < rows.steps) work.accepted[sequence + own + i] = place;
    }
    listed += all;
  }
}

// 64 bytes of every row of a tile and of the kWindow rows before it; a row more than needed keeps strips whole. The
// pad lets eight rows in a line use all banks.
template <class X, int kWindow>
using RowSlice = X[kTileRows + kWindow][kSliceDim<X> + Pack<X>::kSize];

template <class X, int kWindow>
struct GramShared {
  alignas(16) RowSlice<X, kWindow> slice[2];  // by turns
  int64_t offset[kTileRows + kWindow];        // of the rows in their sequence; negative where there is none
};

// The sums of a strip, by 32 threads: 16 rows of the tile with the kColumns rows that end where the strip does, in
// groups of eight. Entry (n, i) of a thread is that of row(i) and column(n, i), counted from the strip's first ones.
//
// Tensor cores round towards zero: only a slice is summed there, and that to the rest by an ordinary addition.
template <class X, int kWindow>
struct Strip {
  static constexpr int kColumns = kWindow + kStripRows, kGroups = kColumns / 8;
  float sum[kGroups][4] = {};

  static __device__ __forceinline__ int lane() { return threadIdx.x % kMmaLanes; }
  static __device__ __forceinline__ int first() { return threadIdx.x / kMmaLanes * kStripRows; }
  static __device__ __forceinline__ int row(int i) { return lane() / 4 + i / 2 * 8; }
  static __device__ __forceinline__ int column(int n, int i) { return 8 * n + lane() % 4 * 2 + i % 2; }

  __device__ __forceinline__ void add(const RowSlice<X, kWindow>& rows) {
    uint32_t a[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
      load_matrices(a[step], &rows[first() + kWindow + lane() % 16][16 * step + lane() / 16 * 8]);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      uint32_t b[4];
      load_matrices(b, &rows[first() + 8 * n + lane() % 8][lane() / 8 * 8]);
      float slice[4] = {};
      multiply_add_16x8x16<X>(slice, a[0], b[0], b[1]);
      multiply_add_16x8x16<X>(slice, a[1], b[2], b[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] += slice[i];
    }
  }
};

// On CUDA cores, with slices summed apart as well: 16 products and 32 slices are shorter sums than 512 products.
// Threads 2 i and 2 i + 1 read the same columns, i and i + 2 the same rows: shared memory serves them at once.
template <int kWindow>
struct Strip<float, kWindow> {
  static constexpr int kColumns = kWindow + kStripRows, kGroups = kColumns / 8;
  static constexpr int kAtOnce = kGroups % 6 == 0 ? 6 : 5;  // groups that share what is read of the rows
  static_assert(kGroups % kAtOnce == 0, "no group is left over");
  float sum[kGroups][4] = {};

  static __device__ __forceinline__ int lane() { return threadIdx.x % kMmaLanes; }
  static __device__ __forceinline__ int first() { return threadIdx.x / kMmaLanes * kStripRows; }
  static __device__ __forceinline__ int row(int i) { return lane() / 16 * 2 + lane() % 2 + 4 * i; }
  static __device__ __forceinline__ int column(int n, int) { return 8 * n + lane() / 2 % 8; }

  __device__ __forceinline__ void add(const RowSlice<float, kWindow>& rows) {
    constexpr int kPack = Pack<float>::kSize;
#pragma unroll
    for (int begin = 0; begin < kGroups; begin += kAtOnce) {
      float slice[kAtOnce][4] = {};
#pragma unroll 1
      for (int d = 0; d < kSliceDim<float>; d += kPack) {
        Pack<float> a[4], b[kAtOnce];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Pack<float>*>(&rows[first() + kWindow + row(i)][d]);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          b[n] = *reinterpret_cast<const Pack<float>*>(&rows[first() + column(begin + n, 0)][d]);
#pragma unroll
        for (int e = 0; e < kPack; ++e)
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) slice[n][i] = fmaf(a[i].value[e], b[n].value[e], slice[n][i]);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[begin + n][i] += slice[n][i];
    }
  }
};

// A thread's packs of a slice on their way to shared memory; zeros where there is no row, and past a row's end.
template <class X, int kWindow>
struct GramSliceInFlight {
  static constexpr int kAcross = kSliceDim<X> / Pack<X>::kSize, kDown = kTileThreads / kAcross;
  static constexpr int kEach = (kTileRows + kWindow) / kDown;
  static_assert(kEach * kDown == kTileRows + kWindow, "threads share the rows evenly");
  Pack<X> pack[kEach];

  static __device__ __forceinline__ int row(int e) { return int(threadIdx.x) / kAcross + e * kDown; }
  static __device__ __forceinline__ int column() { return int(threadIdx.x) % kAcross * Pack<X>::kSize; }

  __device__ __forceinline__ void load(const X* sequence, const int64_t* offset, int64_t first, const GramRows& rows) {
    first += column();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      pack[e] = {};
      if (offset[row(e)] < 0 || first >= rows.dim) continue;
      const X* const data = sequence + offset[row(e)];
      pack[e] = allows_packs(data, rows.dim_stride, rows.dim)
                    ? load_pack<true>(data, rows.dim_stride, first, rows.dim)
                    : load_pack<false>(data, rows.dim_stride, first, rows.dim);
    }
  }

  __device__ __forceinline__ void store(RowSlice<X, kWindow>& slice) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) *reinterpret_cast<Pack<X>*>(&slice[row(e)][column()]) = pack[e];
  }
};

// Blocks on a multiprocessor that the compiler leaves registers for, 0 if it is to choose.
template <class X, int kWindow>
constexpr int kTileBlocks = sizeof(X) == 4 && kWindow == 128 ? 3 : 0;

// Grid (batch * ceil(steps / kTileRows), splits). kWindow: 32, 64 or 128, at least the window.
//
// A block owns kTileRows rows i of a sequence's list, and computes for each the products with the rows i - k, k < N,
// over one split of the elements. It reads its rows and the N - 1 before them once; slices arrive in registers while
// those before are multiplied.
template <class X, int kWindow>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<X, kWindow>)
    window_gram_products_kernel(const GramRows rows, const GramWork work) {
  using Shared = GramShared<X, kWindow>;
  RMT_SHARED Shared shared;
  const int64_t tiles = (rows.steps + kTileRows - 1) / kTileRows;
  const int64_t b = blockIdx.x / tiles, tile = blockIdx.x % tiles * kTileRows, sequence = b * rows.steps;
  const int64_t listed = work.accepted[sequence + rows.steps - 1];
  if (tile >= listed) return;
  for (int i = threadIdx.x; i < kTileRows + kWindow; i += kTileThreads) {
    const int64_t place = tile - kWindow + i;
    const bool needed = place >= 0 && place > tile - rows.window && place < listed;
    shared.offset[i] = needed ? work.offset[sequence + place] : -1;
  }
  __syncthreads();  // the offsets are there

  using Own = Strip<X, kWindow>;
  Own strip;
  GramSliceInFlight<X, kWindow> slice;
  const X* const data = static_cast<const X*>(rows.data) + b * rows.batch_stride;
  const int64_t begin = blockIdx.y * kSplitDim, end = begin + kSplitDim < rows.dim ? begin + kSplitDim : rows.dim;
  slice.load(data, shared.offset, begin, rows);
  slice.store(shared.slice[0]);
  __syncthreads();  // the first slice is there
  int turn = 0;
  for (int64_t next = begin + kSliceDim<X>; next - kSliceDim<X> < end; next += kSliceDim<X>, turn ^= 1) {
    if (next < end) slice.load(data, shared.offset, next, rows);
    strip.add(shared.slice[turn]);
    if (next < end) slice.store(shared.slice[turn ^ 1]);
    __syncthreads();  // nobody reads the slice that the next round overwrites
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = tile + Own::first() + Own::row(i);
    if (place >= listed) continue;
    float* const sums = work.sums + ((blockIdx.y * rows.batch + b) * rows.steps + place) * rows.window;
#pragma unroll
    for (int n = 0; n < Own::kGroups; ++n) {
      const int k = Own::row(i) + kWindow - Own::column(n, i);
      if (k >= 0 && k < rows.window) sums[k] = strip.sum[n][i];
    }
  }
}

// Threads of a copying block side by side, so that neighbours write neighbours.
RMT_HD int copy_width(int64_t window) {
  return window <= kWarpSize ? kWarpSize : window <= kCopyThreads / 2 ? kCopyThreads / 2 : kCopyThreads;
}

// Grid: blocks take turns at the rows. Adds up the splits, in float64, and puts each product where both of its rows
// look for it. Products of accepted rows fit float32, but for their rounding.
__global__ void __launch_bounds__(kCopyThreads) window_gram_band_kernel(const GramRows rows, const GramWork work) {
  const int width = copy_width(rows.window), k = threadIdx.x % width, down = kCopyThreads / width;
  const int64_t count = rows.batch * rows.steps, splits = (rows.dim + kSplitDim - 1) / kSplitDim;
  for (int64_t row = int64_t(blockIdx.x) * down + threadIdx.x / width; row < count; row += int64_t(gridDim.x) * down) {
    const int64_t b = row / rows.steps, i = row % rows.steps;
    if (k >= rows.window || k > i || i >= work.accepted[(b + 1) * rows.steps - 1]) continue;
    double total = 0;
    for (int64_t split = 0; split < splits; ++split)
      total += double(work.sums[(split * count + row) * rows.window + k]);
    const float product = fminf(fmaxf(float(total), -kLargestFloat), kLargestFloat);
    float* const middle = work.band + row * 2 * rows.window + rows.window - 1;
    middle[-k] = product;
    middle[k - k * 2 * rows.window] = product;
  }
}

// Grid: blocks take turns at the windows, of which a sequence has steps / stride.
//
//   gram(r, c) = band(i, j): i and j are the newest rows of the slots r and c; 0 where a slot is not yet in use
__global__ void __launch_bounds__(kCopyThreads)
    window_gram_windows_kernel(const GramRows rows, const GramWork work, int64_t stride, float* gram, int64_t* seen) {
  const int window = int(rows.window), width = copy_width(window), c = threadIdx.x % width;
  const int64_t windows = rows.steps / stride;
  for (int64_t w = blockIdx.x; w < rows.batch * windows; w += gridDim.x) {
    const int64_t sequence = w / windows * rows.steps;
    const int64_t accepted = work.accepted[sequence + (w % windows + 1) * stride - 1];
    if (threadIdx.x == 0) seen[w] = accepted;
    if (c >= window) continue;
    const int newest = accepted > 0 ? int(window_slot(accepted - 1, window)) : -1;  // slot of the newest row
    const int64_t in_first_slot = accepted - 1 - newest;
    const auto row_in = [&](int slot) { return in_first_slot + slot - (slot > newest ? window : 0); };
    const int64_t j = row_in(c);
    for (int r = threadIdx.x / width; r < window; r += kCopyThreads / width) {
      const int64_t i = row_in(r);
      gram[(w * window + r) * window + c] =
          i < 0 || j < 0 ? 0 : work.band[(sequence + i) * 2 * window + window - 1 + (j - i)];
    }
  }
}

}  // namespace rmtkernels
