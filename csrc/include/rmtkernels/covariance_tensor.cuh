// covariance, device code: the products of 16-bit rows for a float32 state, on tensor cores.
//
// x - mean has more digits than a 16-bit number holds, however few x has. So rows are centred in float32, scaled by a
// power of two per column so that none exceeds 2^15, and split into two float16 numbers, c = high + low, which keep 22
// binary digits. Three products of the tensor cores make one of these: high high + high low + low high (what is left
// out is below 2^-24 of it). Tensor cores sum in float32 but round towards zero: only kDepth rows are summed there, and
// that to the rest by an ordinary addition. Splitting and short sums: Ootomo and Yokota, arXiv 2203.03341.
//
// The scale comes from a bound: sqrt(w) |x - mean| is at most the root of the column's own scatter, which is known.
#pragma once

#include "rmtkernels/covariance_scatter.cuh"
#include "rmtkernels/tensor_core.cuh"

#ifndef RMT_COVARIANCE_TENSOR_CHUNK_ROWS
#define RMT_COVARIANCE_TENSOR_CHUNK_ROWS 4096  // tests set it to 64
#endif

namespace rmtkernels {

constexpr int kTensorTile = kTile<float>;
constexpr int kTensorDepth = 32;             // rows in shared memory, and in one sum of the tensor cores
constexpr int kTensorRow = kTensorTile + 8;  // float16 numbers from one row to the next: eight rows, all banks
constexpr int64_t kTensorChunkRows = RMT_COVARIANCE_TENSOR_CHUNK_ROWS;  // added in registers
static_assert(RowList<float>::kLength >= 2 * kTensorDepth, "rows are listed before they are fetched");
constexpr int kHalves = 2;  // high, low

// Of a column: x less its mean, times the scale, is fma(x, scale, high) + low, where the first sum is exact wherever
// digits would be lost.
struct TensorMeans {
  float scale[2][kTensorTile], high[2][kTensorTile], low[2][kTensorTile];
  float unscale[2][kTensorTile];  // one over the scale, which is a power of two

  // A thread takes eight neighbours; so that a warp's threads do not all want the same banks, the first four of every
  // eight come first.
  static __device__ __forceinline__ int place(int column) {
    return column / 4 % 2 * (kTensorTile / 2) + column / 8 * 4 + column % 4;
  }

  __device__ __forceinline__ void set(int side, int column, double mean, float power) {
    const int at = place(column);
    scale[side][at] = power;
    high[side][at] = -float(mean) * power;
    low[side][at] = float(double(float(mean)) - mean) * power;
    unscale[side][at] = 1 / power;
  }
};

struct TensorShared {
  float16 part[2][2][kHalves][kTensorDepth][kTensorRow];  // by turns, of rows and of columns of the tile
  TensorMeans means;
  RowList<float> list;
  ScatterBlock<float> block;
};
static_assert(sizeof(TensorShared) <= 99 * 1024, "the least that a shipped architecture gives a block");

// The largest power of two p with p sqrt(moment) <= 2^15, within 2^60: a mean times the scale still fits float32.
__device__ __forceinline__ float column_scale(double moment) {
  int exponent = 0;
  frexp(sqrt(moment), &exponent);  // sqrt(moment) < 2^exponent; 0 for 0
  const int power = 15 - exponent;
  return ldexpf(1, power > 60 ? 60 : power < -60 ? -60 : power);
}

// A warp's fragments of one slice: 32 rows of the tile by 64 of its columns, over kTensorDepth rows of the batch.
class WarpTile {
 public:
  static constexpr int kSteps = kTensorDepth / 16, kRowTiles = 2, kColumnPairs = 4;
  float sum[kRowTiles][kColumnPairs][2][4] = {};

  __device__ __forceinline__ WarpTile() : lane_(threadIdx.x % kMmaLanes), warp_(threadIdx.x / kMmaLanes) {}

  __device__ __forceinline__ void take_rows(const float16 (&rows)[kHalves][kTensorDepth][kTensorRow]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
          load_transposed(a_[step][m][h],
                          &rows[h][16 * step + lane_ % 8 + lane_ / 16 * 8][first_row() + 16 * m + lane_ / 8 % 2 * 8]);
  }

  // Adds the products of the rows taken with 16 of the columns.
  __device__ __forceinline__ void add_pair(const float16 (&columns)[kHalves][kTensorDepth][kTensorRow], int pair) {
    float slice[kRowTiles][2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[kHalves][4];
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
        load_transposed(b[h], &columns[h][16 * step + lane_ % 16][first_column() + 16 * pair + lane_ / 16 * 8]);
      multiply(slice, a_[step], b, 1, 0);
      multiply(slice, a_[step], b, 0, 1);
      multiply(slice, a_[step], b, 0, 0);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[m][pair][i / 4][i % 4] += slice[m][i / 4][i % 4];
  }

  // Adds the sums, each times what `unscale` says of its row and column, to the block's, and begins anew.
  __device__ __forceinline__ void flush(const ScatterBlock<float>& block, const TensorMeans& means) {
#pragma unroll
    for (int part = 0; part < 2 * kRowTiles; ++part) {
      const int m = part / 2, down = part % 2, row = first_row() + 16 * m + 8 * down + lane_ / 4;
      ScatterBlock<float>::Neighbours<2> all[2 * kColumnPairs];  // loads that do not wait for each other
#pragma unroll
      for (int n = 0; n < 2 * kColumnPairs; ++n) all[n] = block.read<2>(row, column_of(n));
      const double row_unscale = means.unscale[0][TensorMeans::place(row)];
#pragma unroll
      for (int n = 0; n < 2 * kColumnPairs; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& own = sum[m][n / 2][n % 2][2 * down + c];
          all[n].value[c] += float(own * (row_unscale * means.unscale[1][TensorMeans::place(column_of(n) + c)]));
          own = 0;
        }
        block.write(row, column_of(n), all[n]);
      }
    }
  }

 private:
  int lane_, warp_;
  uint32_t a_[kSteps][kRowTiles][kHalves][4];  // the rows taken

  __device__ __forceinline__ int column_of(int n) const { return first_column() + 8 * n + lane_ % 4 * 2; }
  __device__ __forceinline__ int first_row() const { return warp_ % 4 * 32; }
  __device__ __forceinline__ int first_column() const { return warp_ / 4 * 64; }

  static __device__ __forceinline__ void multiply(float (&slice)[kRowTiles][2][4],
                                                  const uint32_t (&a)[kRowTiles][kHalves][4],
                                                  const uint32_t (&b)[kHalves][4], int half_a, int half_b) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        multiply_add_16x8x16(slice[m][n], a[m][half_a], b[half_b][2 * n], b[half_b][2 * n + 1]);
  }
};

// Splits what a thread has of a slice, for one side of the tile.
template <class Slice>
__device__ __forceinline__ void store_halves(TensorShared& shared, const Slice& slice, int turn, int side,
                                             const float* root) {
  const TensorMeans& means = shared.means;
  uint32_t first[Slice::kEach][4], second[Slice::kEach][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = means.place(Slice::column() + 4 * half);
    float scale[4], high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scale[i] = means.scale[side][at + i], high[i] = means.high[side][at + i], low[i] = means.low[side][at + i];
#pragma unroll
    for (int e = 0; e < Slice::kEach; ++e) {
      float value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        value[i] =
            (fmaf(to_float(slice.pack[e].value[4 * half + i]), scale[i], high[i]) + low[i]) * root[Slice::row(e)];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = round_pair(value[2 * i], value[2 * i + 1]);
        first[e][2 * half + i] = pair;
        second[e][2 * half + i] = round_pair(value[2 * i] - first_of(pair), value[2 * i + 1] - second_of(pair));
      }
    }
  }
#pragma unroll
  for (int e = 0; e < Slice::kEach; ++e) {
    memcpy(&shared.part[turn][side][0][Slice::row(e)][Slice::column()], first[e], sizeof(first[e]));
    memcpy(&shared.part[turn][side][1][Slice::row(e)][Slice::column()], second[e], sizeof(second[e]));
  }
}

// Grid (tiles, splits), sizeof(TensorShared) bytes of shared memory. Rows are split while the tensor cores multiply
// those before.
template <class X>
__global__ void __launch_bounds__(kScatterThreads, 1) covariance_tensor_kernel(const CovarianceScatter<float> args) {
  using Slice = SliceInFlight<X, kTensorDepth, kTensorTile>;
  static_assert(Pack<X>::kSize == 8, "as TensorMeans::place takes it");
  RMT_DYN_SHARED(TensorShared, shared);
  const CovariancePlan plan = *args.work.plan;
  if (threadIdx.x == 0) shared->block.find(args, plan);
  __syncthreads();
  const ScatterBlock<float>& block = shared->block;
  const int64_t count = block.end - block.begin;
  if (count <= 0) return;
  block.start(args, plan);
  shared->list.load(args.work, block.begin, block.end, 0);
  for (int i = threadIdx.x; i < 2 * kTensorTile; i += kScatterThreads) {
    const int64_t j = (i < kTensorTile ? block.first_row : block.first_column) + i % kTensorTile;
    const bool exists = j < args.batch.dim;
    shared->means.set(i / kTensorTile, i % kTensorTile, exists ? args.work.mean[j] : 0,
                      column_scale(exists ? args.work.moment[j] : 0));
  }

  Slice slice = {};  // of one side: of the rows of the tile first
  const auto fetch = [&](int64_t first, int side) {
    slice.load(args.batch, shared->list.offset + shared->list.place(first),
               side == 0 ? block.first_row : block.first_column);
  };
  const auto store = [&](int64_t first, int turn, int side) {
    store_halves(*shared, slice, turn, side, shared->list.root + shared->list.place(first));
  };

  WarpTile tile;
  __syncthreads();  // the list and the means are there, and what the sums begin with
#pragma unroll
  for (int side = 0; side < 2; ++side) fetch(0, side), store(0, 0, side);
  __syncthreads();
  int turn = 0;
  for (int64_t done = 0; done < count; turn ^= 1) {
    if (done % RowList<float>::kLength == 0)
      shared->list.load(args.work, block.begin, block.end, done + RowList<float>::kLength);
    const int64_t next = done + kTensorDepth;
    if (next < count) fetch(next, 0);
    tile.take_rows(shared->part[turn][0]);
#pragma unroll
    for (int pair = 0; pair < WarpTile::kColumnPairs; ++pair) {
      tile.add_pair(shared->part[turn][1], pair);
      if (pair % 2 == 1 && next < count) store(next, turn ^ 1, pair / 2);
      if (pair == 1 && next < count) fetch(next, 1);
    }
    done = next;
    if (done >= count || done % kTensorChunkRows == 0) tile.flush(block, shared->means);
    __syncthreads();
  }
}

}  // namespace rmtkernels
