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
#define RMT_COVARIANCE_CHUNK_ROWS 256  // tests set it to 64, to see what happens between chunks and splits
#endif

namespace rmtkernels {

constexpr int kScatterThreads = 256;
constexpr int64_t kWaveBlocks = 264;  // in flight at once: two on each of 132 multiprocessors
constexpr int64_t kMostWaves = 8;
constexpr int64_t kChunkRows = RMT_COVARIANCE_CHUNK_ROWS;  // added in a register on CUDA cores
constexpr int64_t kLeastSplitRows = kChunkRows;            // a slab costs about as much as half as many rows
constexpr int64_t kSplitStep = 32;                         // splits are multiples of it, and of every slice

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

// Splits of a list of so many rows: enough that blocks come in nearly full waves, if the rows suffice.
RMT_HD int64_t splits_of(int64_t rows, int64_t tiles) {
  const int64_t most = rows > kLeastSplitRows ? rows / kLeastSplitRows : 1;
  int64_t best = 1, best_blocks = 0, best_waves = 1;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    int64_t splits = waves * kWaveBlocks / tiles;
    if (splits > most) splits = most;
    if (splits * tiles * best_waves > best_blocks * waves)
      best = splits, best_blocks = splits * tiles, best_waves = waves;
    if (best_blocks * 10 >= best_waves * kWaveBlocks * 9) break;
  }
  return best;
}

RMT_HD int64_t rows_per_split(int64_t rows, int64_t tiles) {
  const int64_t splits = splits_of(rows, tiles), share = (rows + splits - 1) / splits;
  return (share + kSplitStep - 1) / kSplitStep * kSplitStep;
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
    constexpr int kAtOnce = 8;  // loads that do not wait for each other
#pragma unroll 1
    for (int first = threadIdx.x; first < kTile<T> * kTile<T>; first += kAtOnce * kScatterThreads) {
      T value[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int e = first + i * kScatterThreads, row = e / kTile<T>, column = e % kTile<T>;
        value[i] = !is_slab && exists(row, column)
                       ? carried(s, plan, first_row + row, first_column + column, sums + row * stride + column)
                       : T(0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int e = first + i * kScatterThreads, row = e / kTile<T>, column = e % kTile<T>;
        if (exists(row, column)) sums[row * stride + column] = value[i];
      }
    }
  }

  // Neighbouring sums, at most a pack; anything where none exists.
  template <int kCount>
  struct alignas(kCount * sizeof(T)) Neighbours {
    T value[kCount];
  };

  template <int kCount>
  __device__ __forceinline__ Neighbours<kCount> read(int row, int column) const {
    Neighbours<kCount> found = {};
    if (!exists(row, column)) return found;
    const T* const from = sums + row * stride + column;
    if (allows_packs && exists(row, column + kCount - 1)) return *reinterpret_cast<const Neighbours<kCount>*>(from);
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      if (exists(row, column + c)) found.value[c] = from[c];
    return found;
  }

  template <int kCount>
  __device__ __forceinline__ void write(int row, int column, const Neighbours<kCount>& all) const {
    if (!exists(row, column)) return;
    T* const to = sums + row * stride + column;
    if (allows_packs && exists(row, column + kCount - 1)) {
      *reinterpret_cast<Neighbours<kCount>*>(to) = all;
      return;
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      if (exists(row, column + c)) to[c] = all.value[c];
  }
};

constexpr int kSlabBlocks = 16;  // of a tile

// S += the slabs. Grid (tiles, kSlabBlocks).
template <class T>
__global__ void __launch_bounds__(kScatterThreads) covariance_slabs_kernel(const CovarianceScatter<T> args) {
  constexpr int64_t kEntries = int64_t(kTile<T>) * kTile<T>;
  const CovariancePlan plan = *args.work.plan;
  if (plan.rows == 0) return;
  const int64_t tiles = gridDim.x, share = rows_per_split(plan.rows, tiles), dim = args.batch.dim;
  if (share >= plan.rows) return;
  int64_t tile_row, tile_column;
  find_tile(blockIdx.x, &tile_row, &tile_column);
  for (int e = blockIdx.y * kScatterThreads + threadIdx.x; e < kEntries; e += kSlabBlocks * kScatterThreads) {
    const int64_t i = tile_row * kTile<T> + e / kTile<T>, j = tile_column * kTile<T> + e % kTile<T>;
    if (i >= dim || j > i) continue;
    T* const place = args.scatter + i * dim + j;
    T sum = 0;
#pragma unroll 4
    for (int64_t split = 0; split * share < plan.rows; ++split)
      sum += args.slabs[(split * tiles + blockIdx.x) * kEntries + e];
    *place = carried(args, plan, i, j, place) + sum;
  }
}

// Means of the columns of both sides of a tile, in shared memory: an element less its column's mean, rounded to T.
template <class T>
struct WholeMeans {
  alignas(16) double mean[2][kTile<T>];

  __device__ __forceinline__ void set(int side, int column, double m) { mean[side][column] = m; }

  template <int kCount>
  struct Columns {
    double mean[kCount];
    template <class X>
    __device__ __forceinline__ T subtract_from(X x, int c) const {
      return T(to_double(x) - mean[c]);
    }
  };
  template <int kCount>
  __device__ __forceinline__ Columns<kCount> columns(int side, int first) const {
    Columns<kCount> taken;
#pragma unroll
    for (int c = 0; c < kCount; ++c) taken.mean[c] = mean[side][first + c];
    return taken;
  }
};

// The same from float32 to float32, with the mean in two parts: the first difference is exact where digits would be
// lost, so a mean far from zero costs nothing.
struct SplitMeans {
  alignas(16) float high[2][kTile<float>], low[2][kTile<float>];

  __device__ __forceinline__ void set(int side, int column, double m) {
    high[side][column] = float(m);
    low[side][column] = float(m - double(float(m)));
  }

  template <int kCount>
  struct Columns {
    float high[kCount], low[kCount];
    __device__ __forceinline__ float subtract_from(float x, int c) const { return (x - high[c]) - low[c]; }
  };
  template <int kCount>
  __device__ __forceinline__ Columns<kCount> columns(int side, int first) const {
    Columns<kCount> taken;
#pragma unroll
    for (int c = 0; c < kCount; ++c) taken.high[c] = high[side][first + c], taken.low[c] = low[side][first + c];
    return taken;
  }
};

// Where the listed rows of a split lie and the roots of their weights, in shared memory: as many as are about to be
// fetched, and as many again. Roots of rows past the end are 0, which makes zeros of whatever finite numbers stand for
// these rows.
template <class T>
struct RowList {
  static constexpr int64_t kLength = kChunkRows;
  int64_t offset[2 * kLength];
  T root[2 * kLength];

  static __device__ __forceinline__ int place(int64_t row) { return int(row % (2 * kLength)); }

  // Rows first .. first + kLength - 1 of those that begin at `begin`. A barrier has to follow.
  __device__ __forceinline__ void load(const CovarianceWork& work, int64_t begin, int64_t end, int64_t first) {
    for (int64_t row = first + threadIdx.x; row < first + kLength; row += kScatterThreads) {
      const bool listed = begin + row < end;
      offset[place(row)] = listed ? work.offset[begin + row] : -1;
      root[place(row)] = listed ? T(work.root[begin + row]) : T(0);
    }
  }
};

// Rows of one slice on their way from the batch to shared memory, for one of the two sides of a tile.
template <class X, int kDepth, int kColumns>
struct SliceInFlight {
  static constexpr int kPack = Pack<X>::kSize, kAcross = kColumns / kPack, kPacks = kDepth * kAcross;
  static constexpr int kEach = (kPacks + kScatterThreads - 1) / kScatterThreads;  // packs of a thread
  static_assert(kScatterThreads % kAcross == 0, "a thread's packs lie one under the other");
  Pack<X> pack[kEach];

  static __device__ __forceinline__ bool exists(int e) {
    return kPacks % kScatterThreads == 0 || e * kScatterThreads + int(threadIdx.x) < kPacks;
  }
  static __device__ __forceinline__ int row(int e) { return (e * kScatterThreads + int(threadIdx.x)) / kAcross; }
  static __device__ __forceinline__ int column() { return int(threadIdx.x) % kAcross * kPack; }

  // `offset`: of the slice's rows; negative past the list's end, where the pack is left as it is.
  __device__ __forceinline__ void load(const CovarianceBatch& batch, const int64_t* offset, int64_t first_column) {
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (exists(e) && offset[row(e)] >= 0)
        pack[e] = load_pack(static_cast<const X*>(batch.data) + offset[row(e)], first_column + column(), batch.dim,
                            batch.allows_packs);
  }
};

// kDepth rows of the two sides of a tile, centred; and what centres them.
template <class X, class T>
struct ScatterShared {
  static constexpr int kDepth = 8;
  alignas(16) T side[2][2][kDepth][kTile<T>];  // by turns, of rows and of columns of the tile
  std::conditional_t<std::is_same_v<X, float> && std::is_same_v<T, float>, SplitMeans, WholeMeans<T>> means;
  RowList<T> list;
  ScatterBlock<T> block;
};

// Grid (tiles, splits). A thread sums 8 x 8 entries (4 x 4 in float64): two times two squares of a pack each, so that
// what a warp reads of shared memory is few and neighbouring.
template <class X, class T>
__global__ void __launch_bounds__(kScatterThreads, sizeof(X) > sizeof(T) ? 1 : 2)
    covariance_scatter_kernel(const CovarianceScatter<T> args) {
  using Shared = ScatterShared<X, T>;
  constexpr int kDepth = Shared::kDepth, kPack = Pack<T>::kSize, kSums = 2 * kPack;
  using Slice = SliceInFlight<X, kDepth, kTile<T>>;
  RMT_SHARED Shared shared;
  const CovariancePlan plan = *args.work.plan;
  if (threadIdx.x == 0) shared.block.find(args, plan);
  __syncthreads();
  const ScatterBlock<T>& block = shared.block;
  const int64_t count = block.end - block.begin;
  if (count <= 0) return;
  block.start(args, plan);
  shared.list.load(args.work, block.begin, block.end, 0);
  for (int i = threadIdx.x; i < 2 * kTile<T>; i += kScatterThreads) {
    const int64_t j = (i < kTile<T> ? block.first_row : block.first_column) + i % kTile<T>;
    shared.means.set(i / kTile<T>, i % kTile<T>, j < args.batch.dim ? args.work.mean[j] : 0);
  }

  Slice slice[2] = {};
  const auto fetch = [&](int64_t first) {
    const int64_t* const offset = shared.list.offset + shared.list.place(first);
    slice[0].load(args.batch, offset, block.first_row);
    slice[1].load(args.batch, offset, block.first_column);
  };
  const auto store = [&](int64_t first, int turn) {
    const T* const root = shared.list.root + shared.list.place(first);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto means = shared.means.template columns<Slice::kPack>(side, Slice::column());
#pragma unroll
      for (int e = 0; e < Slice::kEach; ++e) {
        if (!Slice::exists(e)) continue;
        constexpr int kNeighbours = Slice::kPack < kPack ? Slice::kPack : kPack;
        using Neighbours = typename ScatterBlock<T>::template Neighbours<kNeighbours>;
        const T scale = root[Slice::row(e)];
#pragma unroll
        for (int c = 0; c < Slice::kPack; c += kNeighbours) {
          Neighbours centred;
#pragma unroll
          for (int i = 0; i < kNeighbours; ++i)
            centred.value[i] = means.subtract_from(slice[side].pack[e].value[c + i], c + i) * scale;
          *reinterpret_cast<Neighbours*>(&shared.side[turn][side][Slice::row(e)][Slice::column() + c]) = centred;
        }
      }
    }
  };

  // A group of 32 threads has 4 x 8 of them, the block 4 x 2 groups. Threads 2 i and 2 i + 1 read the same columns, i
  // and i + 2 the same rows: of two halves of such a group shared memory serves each at once.
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int my_row = (group % 4 * 8 + lane / 16 * 2 + lane % 2) * kPack,
            my_column = (group / 4 * 16 + lane / 2 % 8) * kPack;
  T sum[kSums][kSums] = {};
  __syncthreads();  // the list and the means are there, and what the sums begin with
  fetch(0);
  store(0, 0);
  __syncthreads();
  int turn = 0;
  for (int64_t done = 0; done < count; turn ^= 1) {
    if (done % RowList<T>::kLength == 0)
      shared.list.load(args.work, block.begin, block.end, done + RowList<T>::kLength);
    if (done + kDepth < count) fetch(done + kDepth);
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
    done += kDepth;
    if (done < count) store(done, turn ^ 1);
    if (done >= count || done % kChunkRows == 0) {
#pragma unroll
      for (int r = 0; r < kSums; ++r) {
        const int row = my_row + r / kPack * 4 * kPack + r % kPack;
        typename ScatterBlock<T>::template Neighbours<kPack> all[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) all[half] = block.template read<kPack>(row, my_column + half * 8 * kPack);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int c = 0; c < kPack; ++c) {
            all[half].value[c] += sum[r][half * kPack + c];
            sum[r][half * kPack + c] = 0;
          }
          block.write(row, my_column + half * 8 * kPack, all[half]);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace rmtkernels
