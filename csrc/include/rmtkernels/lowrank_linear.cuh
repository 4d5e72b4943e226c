// lowrank_linear, device code: the product of a few rows of activations with the rows of a weight matrix. Status:
// compiled and emulated, and run by hand on an H100.
//
// The operator is two of these products on one stream, x downᵀ and then that with up: the kernel boundary is the only
// synchronisation between blocks, and there is no atomic. One launch would need every block of the second product to
// wait for all of the first: a cooperative grid, which is as large as the GPU and no larger and pays about as much for
// its barrier as a second launch costs, or counters, which somebody must zero before every call and which two streams
// must not share. The second launch has neither risk, and in a CUDA graph it is one more node.
//
// A team of threads owns a few rows of weights, reads each of their elements once, 16 bytes at a time, and multiplies
// them with up to 16 rows of activations. Which thread adds up what depends on the widths and types of the weights
// alone, and products go through fmaf: rows have the same bits in any batch, at any address and in any run.
#pragma once

#include "rmtkernels/gpu.cuh"
#include "rmtkernels/pack.cuh"
#include "rmtkernels/scalar.h"

namespace rmtkernels {

constexpr int kProductThreads = 256;
constexpr int kSmallTeam = 8;      // lanes; the other teams are a warp and the block
constexpr int kPacksInFlight = 4;  // loads that a lane has asked for before it uses the first
constexpr float kNothing = -0.0f;  // x + 0 * kNothing is x to the bit, also where x is a zero

// Blocks on a multiprocessor that the compiler leaves registers for, 0 if it is to choose: what was fastest on an H100
// among what does not spill.
template <class W, int kRows>
constexpr int kMinBlocks = sizeof(W) == 4 || kRows == 4 ? 2
                           : kRows >= 8                 ? 1
                           : kRows == 2                 ? 3
                                                        : 0;

// out(r, j) = <activations(r), weights(j)> + bias(j), for rows r < `rows` and columns j <
// `columns`.
struct ThinProduct {
  const void* activations;  // (rows, dim)
  const void* weights;      // (columns, dim)
  const void* bias;         // (columns,) of the weights' type, or null
  void* out;                // (rows, columns)
  int64_t rows, dim, columns;
  ElementType out_type;
  int team;  // threads that share a sum: kSmallTeam, kWarpSize or kProductThreads
};

// What a lane multiplies at once: Pack<W>::kSize elements of weights, and as many
// activations.
template <class W, class A>
__device__ __forceinline__ bool allows_packs(const ThinProduct& p) {
  constexpr int kBytes = Pack<W>::kSize * int(sizeof(A));
  return p.dim % Pack<W>::kSize == 0 && reinterpret_cast<uintptr_t>(p.weights) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.activations) % (kBytes < 16 ? kBytes : 16) == 0;
}

// kCount activations as float32, by loads of 16 bytes, or one of 8.
template <int kCount, class A>
__device__ __forceinline__ void load_activations(float* to, const A* from) {
  A values[kCount];
  if constexpr (kCount * sizeof(A) == sizeof(float2)) {
    const float2 bits = *reinterpret_cast<const float2*>(from);
    memcpy(values, &bits, sizeof(bits));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += Pack<A>::kSize) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      memcpy(values + i, &bits, sizeof(bits));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_float(values[i]);
}

// A thread's share of kRows * kColumns sums. `activations` and `weights` are those of its
// team's first row and column; past `last_row` and `last_column` the last ones are read
// again, for results that nobody keeps. Pointers walk from row to row: one register pair
// instead of one for each.
template <class W, class A, int kRows, int kColumns>
struct TeamSums {
  static constexpr int kPack = Pack<W>::kSize;
  static constexpr int kBatch = kRows * kColumns < 32 ? kPacksInFlight / kColumns : 1;  // more sums leave no registers
  using Packs = Pack<W>[kBatch][kColumns];

  const A* activations;
  const W* weights;
  int64_t dim;
  int last_row, last_column;
  float sum[kRows * kColumns] = {};

  __device__ __forceinline__ void add_packs(int member, int team) {
    const int64_t step = int64_t(team) * kPack;
    for (int64_t first = int64_t(member) * kPack; first < dim; first += kBatch * step) {
      Packs packs;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) load_weights(packs[b], first + b * step);
      const A* row = activations + first;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        add_row(sum + r * kColumns, packs, row, dim - first, step);
        if (r < last_row) row += dim;
      }
    }
  }

  __device__ __forceinline__ void load_weights(Pack<W> (&packs)[kColumns], int64_t i) const {
    const W* column = weights + i;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      uint4 bits = {0, 0, 0, 0};
      if (i < dim) bits = *reinterpret_cast<const uint4*>(column);
      memcpy(&packs[j], &bits, sizeof(bits));
      if (j < last_column) column += dim;
    }
  }

  // `left`: elements of the row from `row` on.
  static __device__ __forceinline__ void add_row(float* sums, const Packs& packs, const A* row, int64_t left,
                                                 int64_t step) {
    float x[kBatch][kPack];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) x[b][e] = kNothing;
      if (b * step < left) load_activations<kPack>(x[b], row + b * step);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int e = 0; e < kPack; ++e)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[j] = fmaf(x[b][e], to_float(packs[b][j].value[e]), sums[j]);
  }

  // The same sums in the same order, where an address or a width forbids packs.
  __device__ __forceinline__ void add_elements(int member, int team) {
    for (int64_t first = int64_t(member) * kPack; first < dim; first += int64_t(team) * kPack) {
      const int64_t end = first + kPack < dim ? first + kPack : dim;
#pragma unroll 1
      for (int64_t i = first; i < end; ++i) add_element(weights + i, activations + i);
    }
  }

  __device__ __forceinline__ void add_element(const W* column, const A* row) {
    float w[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      w[j] = to_float(*column);
      if (j < last_column) column += dim;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float x = to_float(*row);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[r * kColumns + j] = fmaf(x, w[j], sum[r * kColumns + j]);
      if (r < last_row) row += dim;
    }
  }
};

// Adds kSums sums up over 2 * kOffset neighbouring lanes. At each step a lane gives away
// half of the sums it carries and adds the others; with one left, both lanes carry on with
// it. Every sum is added in the same order, whichever lane ends up with it.
template <int kOffset, int kSums>
__device__ __forceinline__ void add_lanes(float* sum, int lane) {
  if constexpr (kOffset > 0 && kSums > 1) {
    const bool upper = lane & kOffset;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const float keep = upper ? sum[i + kSums / 2] : sum[i], give = upper ? sum[i] : sum[i + kSums / 2];
      sum[i] = keep + __shfl_xor_sync(kAllLanes, give, kOffset);
    }
    add_lanes<kOffset / 2, kSums / 2>(sum, lane);
  } else if constexpr (kOffset > 0) {
    sum[0] += __shfl_xor_sync(kAllLanes, sum[0], kOffset);
    add_lanes<kOffset / 2, 1>(sum, lane);
  }
}

// Writes the sums of kLanes neighbouring lanes to to[0 .. kSums), each by one lane.
template <int kLanes, int kSums>
__device__ __forceinline__ void store_lane_sums(float* to, float* sum, int lane) {
  add_lanes<kLanes / 2, kSums>(sum, lane);
  constexpr int kKept = kSums > kLanes ? kSums / kLanes : 1, kSame = kSums < kLanes ? kLanes / kSums : 1;
  if (lane % kSame != 0) return;
#pragma unroll
  for (int i = 0; i < kKept; ++i) to[lane / kSame * kKept + i] = sum[i];
}

template <class W>
__device__ __forceinline__ void store_result(const ThinProduct& p, int64_t row, int64_t column, float value) {
  if (p.bias != nullptr) value += to_float(static_cast<const W*>(p.bias)[column]);
  const int64_t i = row * p.columns + column;
  switch (p.out_type) {
    case ElementType::kFloat32:
      return round_to(value, static_cast<float*>(p.out) + i);
    case ElementType::kBFloat16:
      return round_to(value, static_cast<bfloat16*>(p.out) + i);
    case ElementType::kFloat16:
      return round_to(value, static_cast<float16*>(p.out) + i);
  }
}

// Grid (ceil(columns / (teams * kColumns)), ceil(rows / kRows)). Reads the weights once per
// kRows rows, and the activations once per team, which but for the first time come from the
// caches.
template <class W, class A, int kRows, int kColumns>
__global__ void __launch_bounds__(kProductThreads, kMinBlocks<W, kRows>) lowrank_product_kernel(const ThinProduct p) {
  constexpr int kSums = kRows * kColumns;
  RMT_SHARED float parts[kProductThreads / kSmallTeam][kSums];  // of a team's sums, one for each warp it has a part of
  const int width = p.team < kWarpSize ? p.team : kWarpSize;
  const int teams = kProductThreads / p.team, parts_per_team = p.team / width;
  const int64_t first_row = int64_t(blockIdx.y) * kRows, first_column = int64_t(blockIdx.x) * teams * kColumns;
  const int64_t rows_left = p.rows - first_row;

  const int64_t mine = first_column + int64_t(threadIdx.x) / p.team * kColumns;
  const int64_t column = mine < p.columns ? mine : p.columns - 1, columns_left = p.columns - column;
  TeamSums<W, A, kRows, kColumns> sums{static_cast<const A*>(p.activations) + first_row * p.dim,
                                       static_cast<const W*>(p.weights) + column * p.dim, p.dim,
                                       int(rows_left < kRows ? rows_left : kRows) - 1,
                                       int(columns_left < kColumns ? columns_left : kColumns) - 1};
  if (allows_packs<W, A>(p)) {
    sums.add_packs(threadIdx.x % p.team, p.team);
  } else {
    sums.add_elements(threadIdx.x % p.team, p.team);
  }

  float* const part = parts[threadIdx.x / width];
  if (width == kSmallTeam) {
    store_lane_sums<kSmallTeam, kSums>(part, sums.sum, threadIdx.x % kSmallTeam);
  } else {
    store_lane_sums<kWarpSize, kSums>(part, sums.sum, threadIdx.x % kWarpSize);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < teams * kSums; i += kProductThreads) {
    const int r = i / (teams * kColumns), c = i % (teams * kColumns), team = c / kColumns;
    if (r >= rows_left || first_column + c >= p.columns) continue;
    float total = 0;
    for (int k = 0; k < parts_per_team; ++k) total += parts[team * parts_per_team + k][r * kColumns + c % kColumns];
    store_result<W>(p, first_row + r, first_column + c, total);
  }
}

}  // namespace rmtkernels
