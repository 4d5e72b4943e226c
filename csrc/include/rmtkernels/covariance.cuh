// covariance, device code, first half: which rows of a batch count, their mean, and what becomes of the state. The
// second half, covariance_scatter.cuh, adds their products. Status: compiled and emulated; an earlier form passed its
// tests on an H100, this one has not run on a GPU.
//
// Five kernels on one stream: norms (a warp per row), select (one block: a list of the rows that count), sums (float64
// column sums over parts of the list), columns (mean, gap to the old mean), commit (one block: totals, mean, and the
// plan that the second half follows). What depends on the data is decided on the device. Everything after the list
// depends on the listed rows alone: rows that are skipped leave the same bits as rows that never came. No atomics.
#pragma once

#include "rmtkernels/block_scan.cuh"
#include "rmtkernels/covariance.h"
#include "rmtkernels/gpu.cuh"
#include "rmtkernels/pack.cuh"
#include "rmtkernels/scalar.h"

namespace rmtkernels {

constexpr int kSampleThreads = 256;
constexpr int kSelectThreads = 512;
constexpr int kRowsPerSelector = 8;  // rows that a thread of the select kernel looks at in one step
constexpr int kLanesAcross = 32;     // threads of the sums kernel side by side, a pack of columns each
constexpr int64_t kMostParts = 64;   // of the list, summed apart
constexpr int64_t kLeastPartRows = 64;
constexpr double kLargestDouble = 1.7976931348623157e308;

// Values of CovarianceWork::given where it is no weight.
constexpr double kGivenRejected = -1, kGivenBadWeight = -2;

struct CovarianceBatch {
  const void* data;
  const void* weights;
  const bool* mask;
  int64_t rows, dim, row_stride, weight_stride, mask_stride;
  bool weights_are_double;
  bool allows_packs;  // every row begins on a multiple of 16 bytes
};

// The rows that count, and what became of the others.
struct CovarianceSelection {
  double weight, squares;  // sums over the rows that count
  int64_t rows, rejected, bad_weights;
};

// What the scatter kernels are to do.
struct CovariancePlan {
  int64_t rows;         // 0: nothing
  double decay;         // of what is there
  double root_between;  // the square root of what the squared gap counts for
  bool fresh;           // what is there means nothing and is not read
};

// Working memory of one update.
struct CovarianceWork {
  double* given;    // (rows,) weight, 0, or one of kGiven...
  int64_t* offset;  // (rows,) where the listed rows begin in the batch, in elements
  double* weight;   // (rows,) of the listed rows
  double* root;     // (rows,) its square root
  double* parts;    // (parts, 2, dim): sums of w x, of w x²
  double* mean;     // (dim,) of the listed rows
  double* gap;      // (dim,) their mean less the state's; 0 if that is fresh
  double* moment;   // (dim,) the least upper bound known of sum of w (x - mean)²
  double* reduced;  // (column blocks, 3): sums of scatter, squared gap, and the state's diagonal
  CovarianceSelection* selection;
  CovariancePlan* plan;
};

template <class X>
__device__ __forceinline__ double to_double(X x) {
  return double(to_float(x));
}
template <>
__device__ __forceinline__ double to_double(double x) {
  return x;
}

// Elements first .. first + size - 1 of a row of `dim`; 0 past its end.
template <class X>
__device__ __forceinline__ Pack<X> load_pack(const X* row, int64_t first, int64_t dim, bool allows_packs) {
  const int left = dim - first < Pack<X>::kSize ? int(dim - first) : Pack<X>::kSize;
  Pack<X> pack;
  if (allows_packs && left == Pack<X>::kSize) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + first);
    memcpy(&pack, &bits, sizeof(bits));
  } else {
#pragma unroll
    for (int i = 0; i < Pack<X>::kSize; ++i) pack.value[i] = i < left ? row[first + i] : X{};
  }
  return pack;
}

// Sum over the block, for every thread, always in the same order. `room` holds a number per warp; it may be used again
// after the next barrier.
__device__ __forceinline__ double block_sum(double value, double* room) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) room[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) sum += room[warp];
  return sum;
}

__device__ __forceinline__ double offered_weight(const CovarianceBatch& batch, int64_t row) {
  if (batch.mask != nullptr && !batch.mask[row * batch.mask_stride]) return 0;
  if (batch.weights == nullptr) return 1;
  const int64_t at = row * batch.weight_stride;
  return batch.weights_are_double ? static_cast<const double*>(batch.weights)[at]
                                  : double(static_cast<const float*>(batch.weights)[at]);
}

// A warp per row: its weight, or why it has none. Rows of weight 0 are not read.
template <class X>
__global__ void __launch_bounds__(kSampleThreads)
    covariance_norms_kernel(const CovarianceBatch batch, const double largest, double* given) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t(blockIdx.x) * (kSampleThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= batch.rows) return;
  double weight = offered_weight(batch, row);
  if (!(weight >= 0 && weight <= kLargestDouble)) {
    weight = kGivenBadWeight;
  } else if (weight > 0) {
    const X* const data = static_cast<const X*>(batch.data) + row * batch.row_stride;
    double norm = 0;
#pragma unroll 4
    for (int64_t i = int64_t(lane) * Pack<X>::kSize; i < batch.dim; i += kWarpSize * Pack<X>::kSize) {
      const Pack<X> x = load_pack(data, i, batch.dim, batch.allows_packs);
#pragma unroll
      for (int e = 0; e < Pack<X>::kSize; ++e) norm = fma(to_double(x.value[e]), to_double(x.value[e]), norm);
    }
    if (!(warp_sum(norm) <= largest)) weight = kGivenRejected;
  }
  if (lane == 0) given[row] = weight;
}

// One block: lists the rows that count in their order, and adds their weights up.
__global__ void __launch_bounds__(kSelectThreads)
    covariance_select_kernel(const CovarianceBatch batch, const double largest, const CovarianceWork work) {
  RMT_SHARED int counts[2][kSelectThreads / kWarpSize];
  RMT_SHARED double sums[4][kSelectThreads / kWarpSize];
  int64_t listed = 0;
  int rejected = 0, bad = 0, turn = 0;
  for (int64_t first = 0; first < batch.rows; first += kSelectThreads * kRowsPerSelector, turn ^= 1) {
    const int64_t own = first + int64_t(threadIdx.x) * kRowsPerSelector;
    double given[kRowsPerSelector];
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerSelector; ++i) {
      given[i] = own + i < batch.rows ? work.given[own + i] : 0;
      mine += given[i] > 0;
      rejected += given[i] == kGivenRejected;
      bad += given[i] == kGivenBadWeight;
    }
    int all;
    int64_t place = listed + exclusive_sum<kSelectThreads>(mine, counts[turn], &all);
#pragma unroll
    for (int i = 0; i < kRowsPerSelector; ++i) {
      if (!(given[i] > 0)) continue;
      work.offset[place] = (own + i) * batch.row_stride;
      work.weight[place] = given[i];
      work.root[place] = fmin(sqrt(given[i]), largest);  // more belongs to a row at the mean, or to a refused update
      ++place;
    }
    listed += all;
  }
  __syncthreads();  // the list is there
  double weight = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < listed; i += kSelectThreads) {
    weight += work.weight[i];
    squares = fma(work.weight[i], work.weight[i], squares);
  }
  const CovarianceSelection found = {block_sum(weight, sums[0]), block_sum(squares, sums[1]), listed,
                                     int64_t(block_sum(rejected, sums[2])), int64_t(block_sum(bad, sums[3]))};
  if (threadIdx.x == 0) *work.selection = found;
}

// Rows of a part of the list.
RMT_HD int64_t rows_per_part(int64_t listed) {
  const int64_t rows = (listed + kMostParts - 1) / kMostParts;
  return rows < kLeastPartRows ? kLeastPartRows : rows;
}

// Grid (ceil(dim / kLanesAcross packs), parts). Blocks whose part the list does not reach have nothing to do.
template <class X>
__global__ void __launch_bounds__(kSampleThreads)
    covariance_sums_kernel(const CovarianceBatch batch, const CovarianceWork work) {
  constexpr int kPack = Pack<X>::kSize, kRowLanes = kSampleThreads / kLanesAcross;
  RMT_SHARED double sums[kRowLanes][kLanesAcross * kPack], squares[kRowLanes][kLanesAcross * kPack];
  const int64_t listed = work.selection->rows, length = rows_per_part(listed), begin = blockIdx.y * length;
  if (begin >= listed) return;
  const int64_t end = begin + length < listed ? begin + length : listed;
  const int across = threadIdx.x % kLanesAcross, down = threadIdx.x / kLanesAcross;
  const int64_t block_column = int64_t(blockIdx.x) * kLanesAcross * kPack, column = block_column + across * kPack;

  double sum[kPack] = {}, square[kPack] = {};
#pragma unroll 4
  for (int64_t i = begin + down; i < end; i += kRowLanes) {
    const double weight = work.weight[i];
    const Pack<X> x =
        load_pack(static_cast<const X*>(batch.data) + work.offset[i], column, batch.dim, batch.allows_packs);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const double value = to_double(x.value[e]), weighted = weight * value;
      sum[e] += weighted;
      square[e] = fma(weighted, value, square[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    sums[down][across * kPack + e] = sum[e];
    squares[down][across * kPack + e] = square[e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kLanesAcross * kPack && block_column + i < batch.dim; i += kSampleThreads) {
    double total = 0, total_squares = 0;
#pragma unroll
    for (int lane = 0; lane < kRowLanes; ++lane) total += sums[lane][i], total_squares += squares[lane][i];
    double* const part = work.parts + 2 * blockIdx.y * batch.dim + block_column + i;
    part[0] = total;
    part[batch.dim] = total_squares;
  }
}

// A thread per column. T: the state's scatter matrix.
template <class T>
__global__ void __launch_bounds__(kSampleThreads)
    covariance_columns_kernel(const double* old_mean, const T* scatter, const double* totals, int64_t dim,
                              const CovarianceWork work) {
  RMT_SHARED double room[3][kSampleThreads / kWarpSize];
  const CovarianceSelection chosen = *work.selection;
  const bool fresh = totals[kTotalWeight] == 0;
  const int64_t j = int64_t(blockIdx.x) * kSampleThreads + threadIdx.x;
  double spread = 0, gap = 0, diagonal = 0;
  if (j < dim && chosen.rows > 0) {
    double sum = 0, squares = 0;
#pragma unroll 8
    for (int64_t part = 0; part * rows_per_part(chosen.rows) < chosen.rows; ++part) {
      sum += work.parts[2 * part * dim + j];
      squares += work.parts[(2 * part + 1) * dim + j];
    }
    const double mean = sum / chosen.weight;
    spread = squares - sum * mean;
    if (!fresh) gap = mean - old_mean[j], diagonal = double(scatter[j * (dim + 1)]);
    work.mean[j] = mean;
    work.gap[j] = gap;
    // The sums' own rounding is far less than the second term.
    work.moment[j] = (spread > 0 ? spread : 0) + 0x1p-40 * squares;
  }
  const double reduced[3] = {block_sum(spread, room[0]), block_sum(gap * gap, room[1]), block_sum(diagonal, room[2])};
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) work.reduced[3 * blockIdx.x + i] = reduced[i];
}

// One block. The trace of the scatter matrix to come is known before anything is written: no entry is larger, and if it
// fits its dtype all of them do.
__global__ void __launch_bounds__(kSampleThreads)
    covariance_commit_kernel(double* mean, double* totals, int64_t dim, double decay, double largest,
                             const CovarianceWork work) {
  RMT_SHARED double room[3][kSampleThreads / kWarpSize];
  const CovarianceSelection chosen = *work.selection;
  const double old_weight = totals[kTotalWeight], old_squares = totals[kTotalSquares];
  const bool fresh = old_weight == 0;
  const int64_t blocks = (dim + kSampleThreads - 1) / kSampleThreads;
  double part[3] = {};
  for (int64_t b = threadIdx.x; b < blocks; b += kSampleThreads)
    for (int i = 0; i < 3; ++i) part[i] += work.reduced[3 * b + i];
  const double spread = block_sum(part[0], room[0]), gap = block_sum(part[1], room[1]),
               diagonal = block_sum(part[2], room[2]);

  const double before = decay * old_weight, after = before + chosen.weight;
  const double between = fresh ? 0 : between_weight(before, chosen.weight);
  const double trace = decay * diagonal + between * gap + (spread < 0 ? 0 : spread);  // NaN is to be refused
  const bool in_range = before >= 0 && after <= kLargestDouble && trace <= largest / 2;
  const bool refused = chosen.bad_weights > 0 || (chosen.rows > 0 && !in_range);
  const bool counts = chosen.rows > 0 && !refused;
  for (int64_t j = threadIdx.x; j < dim && counts; j += kSampleThreads)
    mean[j] = fresh ? work.mean[j] : fma(chosen.weight / after, work.gap[j], mean[j]);
  if (threadIdx.x != 0) return;
  *work.plan = {counts ? chosen.rows : 0, decay, sqrt(between), fresh};
  totals[kTotalRejected] += double(chosen.rejected) + (refused ? double(chosen.rows + chosen.bad_weights) : 0);
  if (!counts) return;
  totals[kTotalSquares] = (fresh ? 0 : decay * decay * old_squares) + chosen.squares;
  totals[kTotalWeight] = after;
  totals[kTotalRows] += double(chosen.rows);
  if (decay < 1 && !fresh) totals[kTotalDecays] += 1;
}

}  // namespace rmtkernels
