// covariance, device code, second half: S = decay S + between gap gapᵀ + sum of w (x - mean)(x - mean)ᵀ, lower
// triangle.
//
// A block owns a tile of S and runs through the listed rows; rows are centred and multiplied by the root of their
// weight on their way into shared memory, the next ones while those before are multiplied. Sums of kChunkRows rows stay
// in registers and are then added to memory, so that no sum is long. Where there are too few tiles to fill a GPU the
// list is split: each split has a slab of tiles of its own, and a last kernel adds these up, always in the same order.
// How the list is split depends on its length and the width of S alone, not on the GPU.
//
// This file: tiles, splits, and the kernel for CUDA cores. covariance_tensor.cuh: the kernel for tensor cores.
#pragma once

#include <type_traits>

#include "rmtkernels/covariance.cuh"

#ifndef RMT_COVARIANCE_CHUNK_ROWS
#define RMT_COVARIANCE_CHUNK_ROWS 256  // tests set it to 32, to see what happens between chunks and splits
#endif

namespace rmtkernels {

constexpr int kScatterThreads = 256;
constexpr int64_t kWantedBlocks = 528;  // of the grid: twice two for each of 132 multiprocessors
constexpr int64_t kChunkRows =
    RMT_COVARIANCE_CHUNK_ROWS;                       // added in a register on CUDA cores; splits are multiples of it
constexpr int64_t kLeastSplitRows = 2 * kChunkRows;  // a slab costs about as much as so many rows

template <class T>
constexpr int kTile = sizeof(T) == 4 ? 128 : 64;

// Arguments of the scatter kernels.
template <class T>
struct CovarianceScatter {
  CovarianceBatch batch;
  CovarianceWork work;
  T* scatter;
  T* slabs;  // (splits, tiles, kTile, kTile)
};

RMT_HD int64_t tiles_of(int64_t dim, int64_t tile) {
  const int64_t across = (dim + tile - 1) / tile;
  return across * (across + 1) / 2;
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Most splits that a list of so many rows has.
RMT_HD int64_t most_splits(int64_t rows, int64_t tiles) {
  const int64_t wanted = (kWantedBlocks + tiles - 1) / tiles, most = rows / kLeastSplitRows;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

RMT_HD int64_t rows_per_split(int64_t rows, int64_t tiles) {
  const int64_t splits = most_splits(rows, tiles), share = (rows + splits - 1) / splits;
  return (share + kChunkRows - 1) / kChunkRows * kChunkRows;
}

// Row and column of a tile of the lower triangle, counted row by row.
__device__ __forceinline__ void find_tile(int64_t number, int64_t* row, int64_t* column) {
  int64_t i = int64_t((sqrt(8.0 * double(number) + 1) - 1) / 2);
  while ((i + 1) * (i + 2) / 2 <= number) ++i;
  while (i * (i + 1) / 2 > number) --i;
  *row = i;
  *column = number - i * (i + 1) / 2;
}

// What S holds before this batch's products are added: what was there, decayed, and the difference of the means.
template <class T>
__device__ __forceinline__ T carried(const CovarianceScatter<T>& s, const CovariancePlan& plan, int64_t i, int64_t j,
                                     const T* place) {
  if (plan.fresh) return 0;
  const T gap_i = T(plan.root_between * s.work.gap[i]), gap_j = T(plan.root_between * s.work.gap[j]);
  return multiply_add(gap_i, gap_j, T(plan.decay) * *place);
}

// The part of the work that a block does: the entries of one tile, from the rows of one split. It lies in shared
// memory: in registers, the compiler would keep the addresses of all sums there throughout.
template <class T>
struct ScatterBlock {
  int64_t first_row, first_column;  // of the tile in S
  int64_t begin, end;               // in the list
  T* sums;                          // the tile in S, or in the split's slab
  int64_t stride;                   // from one of its rows to the next
  int rows, reach;                  // entry (i, j) exists for i < rows and j <= i + reach
  bool allows_packs, is_slab;

  __device__ __forceinline__ void find(const CovarianceScatter<T>& s, const CovariancePlan& plan) {
    const int64_t tiles = gridDim.x, share = plan.rows > 0 ? rows_per_split(plan.rows, tiles) : 1, dim = s.batch.dim;
    int64_t tile_row, tile_column;
    find_tile(blockIdx.x, &tile_row, &tile_column);
    first_row = tile_row * kTile<T>;
    first_column = tile_column * kTile<T>;
    begin = blockIdx.y * share;
    end = begin + share < plan.rows ? begin + share : plan.rows;
    is_slab = share < plan.rows;
    sums = is_slab ? s.slabs + (blockIdx.y * tiles + blockIdx.x) * kTile<T> * kTile<T>
                   : s.scatter + first_row * dim + first_column;
    stride = is_slab ? kTile<T> : dim;
    rows = is_slab || dim - first_row > kTile<T> ? kTile<T> : int(dim - first_row);
    reach = is_slab || tile_row > tile_column ? kTile<T> : 0;
    allows_packs = stride % Pack<T>::kSize == 0 && reinterpret_cast<uintptr_t>(s.scatter) % 16 == 0;
  }

  __device__ __forceinline__ bool exists(int row, int column) const { return row < rows && column <= row + reach; }

  // Writes what the sums begin with. A barrier has to follow.
  __device__ __forceinline__ void start(const CovarianceScatter<T>& s, const CovariancePlan& plan) const {
#pragma unroll 1
    for (int e = threadIdx.x; e < kTile<T> * kTile<T>; e += kScatterThreads) {
      const int row = e / kTile<T>, column = e % kTile<T>;
      if (!exists(row, column)) continue;
      T* const place = sums + row * stride + column;
      *place = is_slab ? T(0) : carried(s, plan, first_row + row, first_column + column, place);
    }
  }

  // Adds neighbouring entries, at most a pack.
  template <int kCount>
  __device__ __forceinline__ void add(int row, int column, const T (&value)[kCount]) const {
    struct alignas(kCount * sizeof(T)) Neighbours {
      T value[kCount];
    };
    if (!exists(row, column)) return;
    T* const to = sums + row * stride + column;
    if (allows_packs && exists(row, column + kCount - 1)) {
      Neighbours all = *reinterpret_cast<const Neighbours*>(to);
#pragma unroll
      for (int c = 0; c < kCount; ++c) all.value[c] += value[c];
      *reinterpret_cast<Neighbours*>(to) = all;
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c)
        if (exists(row, column + c)) to[c] += value[c];
    }
  }
};

// S += the slabs. A block per tile.
template <class T>
__global__ void __launch_bounds__(kScatterThreads) covariance_slabs_kernel(const CovarianceScatter<T> args) {
  constexpr int64_t kEntries = int64_t(kTile<T>) * kTile<T>;
  const CovariancePlan plan = *args.work.plan;
  if (plan.rows == 0) return;
  const int64_t tiles = gridDim.x, share = rows_per_split(plan.rows, tiles), dim = args.batch.dim;
  if (share >= plan.rows) return;
  int64_t tile_row, tile_column;
  find_tile(blockIdx.x, &tile_row, &tile_column);
  for (int e = threadIdx.x; e < kEntries; e += kScatterThreads) {
    const int64_t i = tile_row * kTile<T> + e / kTile<T>, j = tile_column * kTile<T> + e % kTile<T>;
    if (i >= dim || j > i) continue;
    T* const place = args.scatter + i * dim + j;
    T sum = 0;
    for (int64_t split = 0; split * share < plan.rows; ++split)
      sum += args.slabs[(split * tiles + blockIdx.x) * kEntries + e];
    *place = carried(args, plan, i, j, place) + sum;
  }
}

// An element less its column's mean, rounded to T.
template <class X, class T>
struct RoundedCentre {
  double mean;
  static __device__ __forceinline__ RoundedCentre of(double m) { return {m}; }
  __device__ __forceinline__ T subtract_from(X x) const { return T(to_double(x) - mean); }
};

// The same from float32 to float32, with the mean in two parts: the first difference is exact where digits would be
// lost, so a mean far from zero costs nothing.
template <class X>
struct SplitCentre {
  float high, low;
  static __device__ __forceinline__ SplitCentre of(double m) { return {float(m), float(m - double(float(m)))}; }
  __device__ __forceinline__ float subtract_from(X x) const { return (to_float(x) - high) - low; }
};

template <class X, class T>
using Centre = std::conditional_t<sizeof(T) == 4 && sizeof(X) <= 4, SplitCentre<X>, RoundedCentre<X, T>>;

// Rows of one slice on their way from the batch to shared memory, for one of the two sides of a tile.
template <class X, int kDepth, int kColumns>
struct SliceInFlight {
  static constexpr int kPack = Pack<X>::kSize, kAcross = kColumns / kPack, kPacks = kDepth * kAcross;
  static constexpr int kEach = (kPacks + kScatterThreads - 1) / kScatterThreads;  // packs of a thread
  Pack<X> pack[kEach];

  static __device__ __forceinline__ bool exists(int e) {
    return kPacks % kScatterThreads == 0 || e * kScatterThreads + int(threadIdx.x) < kPacks;
  }
  static __device__ __forceinline__ int row(int e) { return (e * kScatterThreads + int(threadIdx.x)) / kAcross; }
  static __device__ __forceinline__ int column() { return int(threadIdx.x) % kAcross * kPack; }

  // `offset`: of the rows, one for each pack; negative for a row past the list's end, which is left as it is.
  __device__ __forceinline__ void load(const CovarianceBatch& batch, const int64_t (&offset)[kEach],
                                       int64_t first_column) {
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (offset[e] >= 0)
        pack[e] = load_pack(static_cast<const X*>(batch.data) + offset[e], first_column + column(), batch.dim,
                            batch.allows_packs);
  }
};

// Where the rows of a slice lie, and the roots of their weights. Roots of rows past the end are 0, which makes zeros of
// whatever finite numbers stand for these rows.
template <int kEach, class T>
struct SliceRows {
  int64_t offset[kEach];
  T root[kEach];

  template <class Slice>
  __device__ __forceinline__ void load(const CovarianceWork& work, int64_t first, int64_t end) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t k = first + Slice::row(e);
      const bool listed = Slice::exists(e) && k < end;
      offset[e] = listed ? work.offset[k] : -1;
      root[e] = listed ? T(work.root[k]) : T(0);
    }
  }
};

// kDepth rows of the two sides of a tile, centred; and the means.
template <class X, class T>
struct ScatterShared {
  static constexpr int kDepth = 8;
  alignas(16) T side[2][2][kDepth][kTile<T>];  // by turns, of rows and of columns of the tile
  Centre<X, T> centre[2][kTile<T>];
  ScatterBlock<T> block;
};

// Grid (tiles, splits). A thread sums 8 x 8 entries (4 x 4 in float64): two times two squares of a pack each, so that
// what a warp reads of shared memory is few and neighbouring.
template <class X, class T>
__global__ void __launch_bounds__(kScatterThreads, 2) covariance_scatter_kernel(const CovarianceScatter<T> args) {
  using Shared = ScatterShared<X, T>;
  constexpr int kDepth = Shared::kDepth, kPack = Pack<T>::kSize, kSums = 2 * kPack;
  using Slice = SliceInFlight<X, kDepth, kTile<T>>;
  RMT_SHARED Shared shared;
  const CovariancePlan plan = *args.work.plan;
  if (threadIdx.x == 0) shared.block.find(args, plan);
  __syncthreads();
  const ScatterBlock<T>& block = shared.block;
  const int64_t begin = block.begin, end = block.end;
  if (begin >= end) return;
  block.start(args, plan);

  for (int i = threadIdx.x; i < 2 * kTile<T>; i += kScatterThreads) {
    const int64_t j = (i < kTile<T> ? block.first_row : block.first_column) + i % kTile<T>;
    shared.centre[i / kTile<T>][i % kTile<T>] = Centre<X, T>::of(j < args.batch.dim ? args.work.mean[j] : 0);
  }
  Slice slice[2] = {};
  SliceRows<Slice::kEach, T> rows;
  const auto fetch = [&](int64_t first) {
    rows.template load<Slice>(args.work, first, end);
    slice[0].load(args.batch, rows.offset, block.first_row);
    slice[1].load(args.batch, rows.offset, block.first_column);
  };
  const auto store = [&](int turn) {
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int e = 0; e < Slice::kEach; ++e) {
        if (!Slice::exists(e)) continue;
        T* const to = &shared.side[turn][side][Slice::row(e)][Slice::column()];
#pragma unroll
        for (int c = 0; c < Slice::kPack; ++c)
          to[c] = shared.centre[side][Slice::column() + c].subtract_from(slice[side].pack[e].value[c]) * rows.root[e];
      }
  };

  // A group of 32 threads has 4 x 8 of them, the block 4 x 2 groups.
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int my_row = (group % 4 * 8 + lane / 8) * kPack, my_column = (group / 4 * 16 + lane % 8) * kPack;
  T sum[kSums][kSums] = {};
  fetch(begin);
  __syncthreads();  // the centres are there, and what the sums begin with
  store(0);
  __syncthreads();
  int turn = 0;
  for (int64_t first = begin; first < end; first += kDepth, turn ^= 1) {
    const bool more = first + kDepth < end;
    if (more) fetch(first + kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Pack<T> a[2], b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = *reinterpret_cast<const Pack<T>*>(&shared.side[turn][0][k][my_row + half * 4 * kPack]);
        b[half] = *reinterpret_cast<const Pack<T>*>(&shared.side[turn][1][k][my_column + half * 8 * kPack]);
      }
#pragma unroll
      for (int r = 0; r < kSums; ++r)
#pragma unroll
        for (int c = 0; c < kSums; ++c)
          sum[r][c] = multiply_add(a[r / kPack].value[r % kPack], b[c / kPack].value[c % kPack], sum[r][c]);
    }
    if (more) store(turn ^ 1);
    if (!more || (first + kDepth - begin) % kChunkRows == 0) {
#pragma unroll
      for (int r = 0; r < kSums; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T sums[kPack];
#pragma unroll
          for (int c = 0; c < kPack; ++c) sums[c] = sum[r][half * kPack + c], sum[r][half * kPack + c] = 0;
          block.add(my_row + r / kPack * 4 * kPack + r % kPack, my_column + half * 8 * kPack, sums);
        }
    }
    __syncthreads();
  }
}

}  // namespace rmtkernels
