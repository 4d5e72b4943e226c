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

namespace rmtkernels {

constexpr int kTensorTile = kTile<float>;
constexpr int kTensorDepth = 32;                      // rows in shared memory, and in one sum of the tensor cores
constexpr int kTensorRow = kTensorTile + 8;           // float16 numbers from one row to the next: eight rows, all banks
constexpr int64_t kTensorChunkRows = 4 * kChunkRows;  // added in registers
constexpr int kHalves = 2;                            // high, low

// Of a column: x less its mean, times the scale, is fma(x, scale, high) + low, where the first sum is exact wherever
// digits would be lost.
struct TensorCentre {
  float scale, high, low, unscale;  // scale: a power of two; unscale: one over it
};

struct TensorShared {
  float16 part[2][2][kHalves][kTensorDepth][kTensorRow];  // by turns, of rows and of columns of the tile
  TensorCentre centre[2][kTensorTile];
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

  __device__ __forceinline__ void add(const float16 (&rows)[kHalves][kTensorDepth][kTensorRow],
                                      const float16 (&columns)[kHalves][kTensorDepth][kTensorRow]) {
    uint32_t a[kSteps][kRowTiles][kHalves][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
          load_transposed(a[step][m][h],
                          &rows[h][16 * step + lane_ % 8 + lane_ / 16 * 8][first_row() + 16 * m + lane_ / 8 % 2 * 8]);
#pragma unroll
    for (int pair = 0; pair < kColumnPairs; ++pair) {
      float slice[kRowTiles][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[kHalves][4];
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
          load_transposed(b[h], &columns[h][16 * step + lane_ % 16][first_column() + 16 * pair + lane_ / 16 * 8]);
        multiply(slice, a[step], b, 1, 0);
        multiply(slice, a[step], b, 0, 1);
        multiply(slice, a[step], b, 0, 0);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[m][pair][i / 4][i % 4] += slice[m][i / 4][i % 4];
    }
  }

  // f(row, column, two neighbouring sums) for all of them, which are set to 0.
  template <class F>
  __device__ __forceinline__ void flush(const F& f) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kColumnPairs; ++n)
#pragma unroll
        for (int down = 0; down < 2; ++down) {
          float* const pair = sum[m][n / 2][n % 2] + 2 * down;
          f(first_row() + 16 * m + 8 * down + lane_ / 4, first_column() + 8 * n + lane_ % 4 * 2, pair[0], pair[1]);
          pair[0] = pair[1] = 0;
        }
  }

 private:
  int lane_, warp_;

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

// Splits a pack of row k, which begins at `column` of a side of the tile.
template <class X>
__device__ __forceinline__ void store_halves(TensorShared& shared, int turn, int side, int k, int column,
                                             const Pack<X>& pack, float root) {
  uint32_t high[Pack<X>::kSize / 2], low[Pack<X>::kSize / 2];
#pragma unroll
  for (int pair = 0; pair < Pack<X>::kSize / 2; ++pair) {
    float value[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const TensorCentre centre = shared.centre[side][column + 2 * pair + c];
      value[c] = (fmaf(to_float(pack.value[2 * pair + c]), centre.scale, centre.high) + centre.low) * root;
    }
    high[pair] = round_pair(value[0], value[1]);
    low[pair] = round_pair(value[0] - first_of(high[pair]), value[1] - second_of(high[pair]));
  }
  memcpy(&shared.part[turn][side][0][k][column], high, sizeof(high));
  memcpy(&shared.part[turn][side][1][k][column], low, sizeof(low));
}

// Grid (tiles, splits), sizeof(TensorShared) bytes of shared memory.
template <class X>
__global__ void __launch_bounds__(kScatterThreads, 1) covariance_tensor_kernel(const CovarianceScatter<float> args) {
  using Slice = SliceInFlight<X, kTensorDepth, kTensorTile>;
  RMT_DYN_SHARED(TensorShared, shared);
  const CovariancePlan plan = *args.work.plan;
  if (threadIdx.x == 0) shared->block.find(args, plan);
  __syncthreads();
  const ScatterBlock<float>& block = shared->block;
  const int64_t begin = block.begin, end = block.end;
  if (begin >= end) return;
  block.start(args, plan);

  for (int i = threadIdx.x; i < 2 * kTensorTile; i += kScatterThreads) {
    const int side = i / kTensorTile, c = i % kTensorTile;
    const int64_t j = (side == 0 ? block.first_row : block.first_column) + c;
    const bool exists = j < args.batch.dim;
    const double mean = exists ? args.work.mean[j] : 0;
    const float scale = column_scale(exists ? args.work.moment[j] : 0), high = float(mean);
    shared->centre[side][c] = {scale, -high * scale, float(high - mean) * scale, 1 / scale};
  }
  Slice slice[2] = {};
  SliceRows<Slice::kEach, float> rows;
  const auto fetch = [&](int64_t first) {
    rows.template load<Slice>(args.work, first, end);
    slice[0].load(args.batch, rows.offset, block.first_row);
    slice[1].load(args.batch, rows.offset, block.first_column);
  };
  const auto store = [&](int turn) {
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int e = 0; e < Slice::kEach; ++e)
        store_halves(*shared, turn, side, Slice::row(e), Slice::column(), slice[side].pack[e], rows.root[e]);
  };

  WarpTile tile;
  fetch(begin);
  __syncthreads();  // the centres are there, and what the sums begin with
  store(0);
  __syncthreads();
  int turn = 0;
  for (int64_t first = begin; first < end; first += kTensorDepth, turn ^= 1) {
    const bool more = first + kTensorDepth < end;
    if (more) fetch(first + kTensorDepth);
    tile.add(shared->part[turn][0], shared->part[turn][1]);
    if (more) store(turn ^ 1);
    if (!more || (first + kTensorDepth - begin) % kTensorChunkRows == 0)
      tile.flush([&](int row, int column, float left, float right) {
        const double down = shared->centre[0][row].unscale;
        const TensorCentre* const across = &shared->centre[1][column];
        block.add(row, column, {float(left * (down * across[0].unscale)), float(right * (down * across[1].unscale))});
      });
    __syncthreads();
  }
}

}  // namespace rmtkernels
