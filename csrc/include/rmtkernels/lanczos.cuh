// lanczos, device code: rows made orthonormal, and orthogonal to a basis, in two passes over the basis. Status:
// compiled and emulated, and run by hand on an H100.
//
// Up to eight rows X at a time, against the basis Q (rows too). A sweep takes one chunk of columns after another: it
// renews X there, and then multiplies it with Q, a chunk of which stays in the caches meanwhile.
//   sweep 0:  C = X Qᵀ
//   sweep 1:  X <- X - C Q, and in the same pass over Q  C = X Qᵀ, H = X Xᵀ
//   factor:   H - C Cᵀ = L Lᵀ, the Gram matrix of X - C Q; rows that depend on others drop out
//   sweep 2:  X <- L⁻¹ (X - C Q), where C Q is left out, and Q not read, if L⁻¹ C is within rounding
// So the second pass measures whether there must be a third, and the device decides. More sweeps follow only where that
// was not the end: a row dropped out and a random one took its place, or L⁻¹ enlarged the rounding of X.
//
// X and Q have the matrix's type, all products and sums are float64. So for float32 the coefficients of what sweep 1
// stored are exact, and what sweep 2 makes of it is orthogonal to the rounding of its result, whatever the condition of
// X. For float64 the factorisation does the same in steps: a pivot below its own rounding is taken for kFloor.
//
// No atomics; which thread adds what depends on the sizes alone.
#pragma once

#include "rmtkernels/gpu.cuh"

#ifndef RMT_LANCZOS_PARTS
#define RMT_LANCZOS_PARTS 128  // about one for each multiprocessor; tests set it to 2, to give a block several chunks
#endif

namespace rmtkernels {

constexpr int kBlockRows = 8;
constexpr int kPairs = kBlockRows * kBlockRows;
constexpr int kSweepThreads = 512, kSweepWarps = kSweepThreads / kWarpSize;
constexpr int kLaneColumns = 2, kChunk = kLaneColumns * kWarpSize;  // columns a thread block holds at a time
constexpr int kMostParts = RMT_LANCZOS_PARTS;                       // thread blocks of a sweep
constexpr int kSumThreads = 256, kSumEntries = 32, kSumSlices = kSumThreads / kSumEntries;
constexpr int kFactorThreads = 512, kFactorSlices = kFactorThreads / kPairs;
constexpr int kSweepShared = (kSweepWarps + 1) * kBlockRows * kChunk * int(sizeof(double));
static_assert(kSweepShared <= 99 * 1024, "more shared memory than every shipped architecture has");

constexpr double kFloor = 0x1p-46;  // of a pivot, relative to the row's own square: rounding of a float64 sum
constexpr double kSmall = 0.1;      // coefficients of a unit row below this are gone once they were taken off

template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
template <class T>
constexpr double kOrthogonal = sizeof(T) == 4 ? 0x1p-22 : 0x1p-46;  // norm of the coefficients a unit row may keep
// A pivot, relative to the row's own square, from which on the rounding of H, float64, is not more than the result's.
template <class T>
constexpr double kSafePivot = sizeof(T) == 4 ? 0x1p-24 : 0x1p-4;

enum LanczosNext : int { kNothing, kRenew, kRenewAndMultiply };

// What the factorisation tells the next sweep, and the next factorisation.
struct LanczosState {
  double mix[kPairs];        // L⁻¹
  double limit[kBlockRows];  // a row that adds no more than this drops out
  int next;                  // a LanczosNext
  bool subtract;
  unsigned leaving, replaced;  // rows that a random one shall replace now, that one has replaced so far
};

// One group of rows, with what it is made orthogonal to: the basis and the groups before it.
template <class T>
struct LanczosGroup {
  const T* rows;    // (count, dim)
  const T* basis;   // (size, dim)
  const T* before;  // (known - size, dim)
  const T* noise;   // (count, dim), of use `shift` columns further on, round the end
  T* unit;          // (count, dim)
  const double* negligible;
  double* products;      // (count, size), rows times basis
  double* triangle;      // column 0 of the group in a matrix of rows of `width`
  double* parts;         // (part_count, known + kBlockRows, kBlockRows)
  double* coefficients;  // (known + kBlockRows, kBlockRows): C, transposed, then H
  LanczosState* state;
  int64_t dim, size, known, width, shift;
  int count, part_count;
  bool in_pairs;  // two columns from an even one on lie in one aligned word

  __device__ __forceinline__ const T* known_row(int64_t i) const {
    return i < size ? basis + i * dim : before + (i - size) * dim;
  }
  __device__ __forceinline__ int64_t entries() const { return (known + kBlockRows) * kBlockRows; }
};

template <class T>
struct alignas(kLaneColumns * sizeof(T)) Columns {
  T value[kLaneColumns];
};

// Columns from `column` on; 0 past the end.
template <class T>
__device__ __forceinline__ void load_columns(double (&to)[kLaneColumns], const LanczosGroup<T>& g, const T* row,
                                             int64_t column) {
  Columns<T> read = {};
  if (g.in_pairs) {
    if (column < g.dim) read = *reinterpret_cast<const Columns<T>*>(row + column);
  } else {
#pragma unroll
    for (int e = 0; e < kLaneColumns; ++e)
      if (column + e < g.dim) read.value[e] = row[column + e];
  }
#pragma unroll
  for (int e = 0; e < kLaneColumns; ++e) to[e] = read.value[e];
}

// A warp's share of C Q in the chunk at `first`, to sums (rows, columns).
template <class T>
__device__ __forceinline__ void add_projections(const LanczosGroup<T>& g, int64_t first, double* sums) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  double sum[kBlockRows][kLaneColumns] = {};
#pragma unroll 4
  for (int64_t i = warp; i < g.known; i += kSweepWarps) {
    double q[kLaneColumns];
    load_columns(q, g, g.known_row(i), first + kLaneColumns * lane);
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) {
      const double c = g.coefficients[i * kBlockRows + r];
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) sum[r][e] = fma(c, q[e], sum[r][e]);
    }
  }
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r)
#pragma unroll
    for (int e = 0; e < kLaneColumns; ++e) sums[(warp * kBlockRows + r) * kChunk + kLaneColumns * lane + e] = sum[r][e];
}

// One entry before mixing: of the row, or of the random one in its place. `sums`: of C Q at this entry, one a warp.
template <class T>
__device__ __forceinline__ double entry(const LanczosGroup<T>& g, const T* rows, int row, int64_t column,
                                        const double* sums, bool subtract, bool leaves) {
  if (row >= g.count || column >= g.dim) return 0;
  if (leaves) return g.noise[row * g.dim + (column >= g.shift ? column - g.shift : column - g.shift + g.dim)];
  double value = rows[row * g.dim + column];
  if (subtract)
    for (int w = 0; w < kSweepWarps; ++w) value -= sums[w * kBlockRows * kChunk];
  return value;
}

// Renews the rows in the chunk at `first`: `sums` hold C Q and then what is not yet mixed, `fresh` what is stored.
template <class T>
__device__ __forceinline__ void renew(const LanczosGroup<T>& g, int sweep, int64_t first, double* sums, double* fresh) {
  const bool mixes = sweep > 1, subtract = mixes ? g.state->subtract : sweep == 1;
  const unsigned leaving = mixes ? g.state->leaving : 0;
  const T* const rows = mixes ? g.unit : g.rows;
  if (subtract) {
    add_projections(g, first, sums);
    __syncthreads();
  }
  for (int e = threadIdx.x; e < kBlockRows * kChunk; e += kSweepThreads) {
    const int r = e / kChunk;
    sums[e] = entry(g, rows, r, first + e % kChunk, sums + e, subtract, leaving >> r & 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kBlockRows * kChunk; e += kSweepThreads) {
    const int r = e / kChunk, c = e % kChunk;
    double value = sums[e];
    if (mixes) {
      value = 0;
      for (int j = 0; j < kBlockRows; ++j) value = fma(g.state->mix[r * kBlockRows + j], sums[j * kChunk + c], value);
    }
    const T stored = T(value);
    fresh[e] = stored;
    if (sweep > 0 && r < g.count && first + c < g.dim) g.unit[r * g.dim + first + c] = stored;
  }
  __syncthreads();
}

// Adds kSums sums up over 2 * kOffset neighbouring lanes. At each step a lane gives away half of the sums it carries,
// until one is left.
template <int kOffset, int kSums>
__device__ __forceinline__ void add_up(double* sum, int lane) {
  if constexpr (kOffset > 0 && kSums > 1) {
    const bool upper = lane & kOffset;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const double keep = upper ? sum[i + kSums / 2] : sum[i], give = upper ? sum[i] : sum[i + kSums / 2];
      sum[i] = keep + __shfl_xor_sync(kAllLanes, give, kOffset);
    }
    add_up<kOffset / 2, kSums / 2>(sum, lane);
  } else if constexpr (kOffset > 0) {
    sum[0] += __shfl_xor_sync(kAllLanes, sum[0], kOffset);
    add_up<kOffset / 2, 1>(sum, lane);
  }
}

// Adds the chunk's share of X Qᵀ and X Xᵀ to those of the thread block; the first chunk begins them.
template <class T>
__device__ __forceinline__ void multiply(const LanczosGroup<T>& g, int64_t first, const double* fresh, bool begins) {
  constexpr int kSame = kWarpSize / kBlockRows;  // neighbouring lanes that end with the same sum
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  double x[kBlockRows][kLaneColumns];
#pragma unroll
  for (int r = 0; r < kBlockRows; ++r)
#pragma unroll
    for (int e = 0; e < kLaneColumns; ++e) x[r][e] = fresh[r * kChunk + kLaneColumns * lane + e];
  double* const part = g.parts + blockIdx.x * g.entries() + lane / kSame;
#pragma unroll 4
  for (int64_t i = warp; i < g.known + kBlockRows; i += kSweepWarps) {
    double q[kLaneColumns], sum[kBlockRows];
    if (i < g.known) {
      load_columns(q, g, g.known_row(i), first + kLaneColumns * lane);
    } else {
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) q[e] = fresh[(i - g.known) * kChunk + kLaneColumns * lane + e];
    }
#pragma unroll
    for (int r = 0; r < kBlockRows; ++r) sum[r] = fma(x[r][0], q[0], x[r][1] * q[1]);
    add_up<kWarpSize / 2, kBlockRows>(sum, lane);
    if (lane % kSame == 0) part[i * kBlockRows] = begins ? sum[0] : part[i * kBlockRows] + sum[0];
  }
}

// Grid: part_count. Sweeps from 2 on do what the factorisation before them left in the state.
template <class T>
__global__ void __launch_bounds__(kSweepThreads, 1) lanczos_sweep_kernel(const LanczosGroup<T> g, int sweep) {
  RMT_DYN_SHARED(double, shared);
  double* const fresh = shared + kSweepWarps * kBlockRows * kChunk;
  const int next = sweep > 1 ? g.state->next : kRenewAndMultiply;
  if (next == kNothing) return;
  const int64_t begin = int64_t(blockIdx.x) * kChunk, step = int64_t(gridDim.x) * kChunk;
  for (int64_t first = begin; first < g.dim; first += step) {
    renew(g, sweep, first, shared, fresh);
    if (next == kRenewAndMultiply) multiply(g, first, fresh, first == begin);
  }
}

// Adds up what the thread blocks of a sweep found. Grid: ceil(entries / kSumEntries). After sweep 0 also hands out the
// products with the basis, and with the groups before.
template <class T>
__global__ void __launch_bounds__(kSumThreads) lanczos_sum_kernel(const LanczosGroup<T> g, int sweep) {
  RMT_SHARED double slices[kSumSlices][kSumEntries];
  if (sweep > 1 && g.state->next != kRenewAndMultiply) return;
  const int slice = threadIdx.x / kSumEntries, mine = threadIdx.x % kSumEntries;
  const int64_t e = int64_t(blockIdx.x) * kSumEntries + mine, entries = g.entries();
  double sum = 0;
  if (e < entries) {
#pragma unroll 4
    for (int p = slice; p < g.part_count; p += kSumSlices) sum += g.parts[p * entries + e];
  }
  slices[slice][mine] = sum;
  __syncthreads();
  if (slice > 0 || e >= entries) return;
  double total = 0;
  for (int s = 0; s < kSumSlices; ++s) total += slices[s][mine];
  g.coefficients[e] = total;
  const int64_t i = e / kBlockRows;
  const int r = int(e % kBlockRows);
  if (sweep > 0 || r >= g.count || i >= g.known) return;
  if (i < g.size)
    g.products[r * g.size + i] = total;
  else
    g.triangle[(i - g.size) * g.width + r] = total;
}

// Shared memory of the factorisation.
struct LanczosFactor {
  double slices[kFactorSlices][kPairs];
  double overlap[kPairs];                   // C Cᵀ
  double own[kBlockRows];                   // squared norms, before C Q is taken off
  double left[kBlockRows][2 * kBlockRows];  // what elimination has left of H - C Cᵀ, and made of the identity
  double pivot[kBlockRows];
  double lower[kPairs];  // L
  double mix[kPairs];    // L⁻¹; zeros in the rows of those that leave
  double product[kPairs];
};

// overlap = C Cᵀ, own = diag H, left = (H - C Cᵀ, 1).
template <class T>
__device__ __forceinline__ void prepare(const LanczosGroup<T>& g, LanczosFactor& f) {
  const int pair = threadIdx.x % kPairs, slice = threadIdx.x / kPairs, r = pair / kBlockRows, s = pair % kBlockRows;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = slice; i < g.known; i += kFactorSlices)
    sum = fma(g.coefficients[i * kBlockRows + r], g.coefficients[i * kBlockRows + s], sum);
  f.slices[slice][pair] = sum;
  __syncthreads();
  if (slice == 0) {
    double overlap = 0;
    for (int k = 0; k < kFactorSlices; ++k) overlap += f.slices[k][pair];
    const double gram = g.coefficients[g.known * kBlockRows + pair];
    f.overlap[pair] = overlap;
    f.left[r][s] = gram - overlap;
    f.left[r][kBlockRows + s] = r == s;
    f.lower[pair] = 0;
    if (r == s) f.own[r] = gram;
  }
  __syncthreads();
}

struct Elimination {
  unsigned leaving = 0;  // rows that add nothing to those before
  bool safe = true;      // no row leaves, and rounding has spoilt no pivot
};

// Gauss elimination of `left`, with an entry to each of the first threads. Every thread returns the same.
template <class T>
__device__ __forceinline__ Elimination eliminate(const LanczosGroup<T>& g, bool begins, bool last, unsigned replaced,
                                                 const double* triangle, LanczosFactor& f) {
  Elimination result;
  const int i = threadIdx.x / (2 * kBlockRows) % kBlockRows, j = threadIdx.x % (2 * kBlockRows);
  for (int k = 0; k < g.count; ++k) {
    const double own = f.own[k], found = f.left[k][k], seen = fmax(found, kFloor * own);
    // What C Q leaves of a basis that is orthonormal to rounding only.
    const double pivot = fmax(seen, kRounding<T> * f.overlap[k * (kBlockRows + 1)]), root = sqrt(pivot);
    const double limit = begins ? fmax(*g.negligible, kRounding<T> * sqrt(own)) : g.state->limit[k];
    const bool stays = (replaced >> k & 1) || last || (begins ? 1 : triangle[k * g.width + k]) * sqrt(seen) > limit;
    if (!stays) result.leaving |= 1u << k;
    result.safe = result.safe && stays && found >= kSafePivot<T> * own;
    const double share = stays && pivot > 0 ? f.left[i][k] / pivot : 0, value = f.left[i][j] - share * f.left[k][j];
    __syncthreads();
    if (threadIdx.x < 2 * kPairs && i > k && i < g.count) {
      f.left[i][j] = value;
      if (j == k) f.lower[i * kBlockRows + k] = share * root;
    }
    if (threadIdx.x == 0) {
      f.pivot[k] = pivot;
      f.lower[k * kBlockRows + k] = root;
      if (begins) g.state->limit[k] = limit;
    }
    __syncthreads();
  }
  return result;
}

// Tells the next sweep how to mix, and multiplies the triangle with L. Returns, in a thread for each of the first rows,
// the squared norm of the coefficients that its new row will have, if they are not taken off.
template <class T>
__device__ __forceinline__ double mix_rows(const LanczosGroup<T>& g, bool begins, unsigned leaving, double* triangle,
                                           LanczosFactor& f) {
  const int pair = threadIdx.x % kPairs, r = pair / kBlockRows, s = pair % kBlockRows;
  const bool leaves = leaving >> r & 1, first = threadIdx.x < kPairs, inside = r < g.count && s < g.count;
  if (first) {
    const double mix = r < g.count && f.pivot[r] > 0 ? f.left[r][kBlockRows + s] / sqrt(f.pivot[r]) : 0;
    f.mix[pair] = leaves ? 0 : mix;
    g.state->mix[pair] = leaves ? r == s : mix;
    double product = 0;
    for (int k = 0; inside && k < g.count; ++k)
      product = fma(begins ? double(k == r) : triangle[k * g.width + r], f.lower[k * kBlockRows + s], product);
    f.product[pair] = product;
  }
  __syncthreads();
  if (first) {
    if (inside) triangle[s * g.width + r] = f.product[pair];
    double sum = 0;
    for (int k = 0; k < kBlockRows; ++k) sum = fma(f.overlap[s * kBlockRows + k], f.mix[r * kBlockRows + k], sum);
    f.slices[0][pair] = sum * f.mix[pair];
  }
  __syncthreads();
  double kept = 0;
  if (threadIdx.x < kBlockRows)
    for (int k = 0; k < kBlockRows; ++k) kept += f.slices[0][threadIdx.x * kBlockRows + k];
  return kept;
}

// Grid: one block. From C and H to the state of sweep `sweep`; after it there is no other if `last`.
template <class T>
__global__ void __launch_bounds__(kFactorThreads, 1)
    lanczos_factor_kernel(const LanczosGroup<T> g, int sweep, bool last) {
  RMT_SHARED LanczosFactor f;
  LanczosState& state = *g.state;
  const bool begins = sweep == 2;
  const int before = begins ? int(kRenewAndMultiply) : state.next;
  const unsigned replaced = begins ? 0 : state.replaced;
  __syncthreads();
  if (before != kRenewAndMultiply) {
    if (threadIdx.x == 0) state.next = kNothing;
    return;
  }
  double* const triangle = g.triangle + (g.known - g.size) * g.width;  // (own units, own rows)
  prepare(g, f);
  const Elimination result = eliminate(g, begins, last, replaced, triangle, f);
  const double kept = mix_rows(g, begins, result.leaving, triangle, f);
  const bool subtract = __syncthreads_or(kept > kOrthogonal<T> * kOrthogonal<T>);
  const bool again = __syncthreads_or(kept > kSmall * kSmall) || !result.safe;
  if (threadIdx.x == 0) {
    state.next = again && !last ? kRenewAndMultiply : kRenew;
    state.subtract = subtract;
    state.leaving = result.leaving;
    state.replaced = replaced | result.leaving;
  }
}

}  // namespace rmtkernels
