// All eigenvalues of one small symmetric matrix by one thread block, in shared memory and float64. Status: see
// spectrum.cuh.
//
// The matrix is reduced to tridiagonal form by Householder reflections; then four threads per eigenvalue close in on it
// by counting signs of Sturm sequences. That never fails to converge, needs no vectors, and finds small eigenvalues to
// their own digits. The order of every sum depends on the size of the matrix alone, not on the launch, so a matrix
// gives the same bits in any company and in a launch made for larger ones.
//
// Threads of a block: x is the row that a thread works on, y one of kParts parts of its columns. A block has at least
// as many x as the matrix has rows, a multiple of the warp size. Calls are made by all threads of the block together;
// what a call leaves in shared memory may be read at once.
#pragma once

#include "rmtkernels/gpu.cuh"
#include "rmtkernels/spectrum.h"

namespace rmtkernels {

constexpr int kParts = 4;
constexpr int kMaxThreads = kMaxWindow * kParts;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

// Where the row `i` of a packed lower triangle begins. Sixteen rows in a column lie in sixteen banks of eight bytes, as
// triangular numbers do modulo a power of two: no padding is needed.
__host__ __device__ constexpr int packed_row(int i) { return i * (i + 1) / 2; }

// Entry (i, j) of a symmetric matrix of which the lower triangle is kept.
__device__ __forceinline__ int packed(int i, int j) { return i >= j ? packed_row(i) + j : packed_row(j) + i; }

// One matrix of up to `capacity` rows in shared memory.
struct BlockMatrix {
  double* a;         // packed lower triangle
  double* v;         // capacity: the reflector, ones, or what a caller keeps there
  double* w;         // capacity
  double* partial;   // kParts x capacity: sums over a part of the columns
  double* diagonal;  // capacity: of the tridiagonal form
  double* squares;   // capacity: squares of its subdiagonal, the last 0
  double* values;    // capacity: eigenvalues, ascending
  double* scalars;   // kMaxWarps: what warps tell each other
  int capacity;

  static __host__ __device__ constexpr int doubles(int capacity) {
    return packed_row(capacity) + (5 + kParts) * capacity + kMaxWarps;
  }

  __device__ BlockMatrix(double* memory, int rows)
      : a(memory),
        v(a + packed_row(rows)),
        w(v + rows),
        partial(w + rows),
        diagonal(partial + kParts * rows),
        squares(diagonal + rows),
        values(squares + rows),
        scalars(values + rows),
        capacity(rows) {}
};

__device__ __forceinline__ int thread_index() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int thread_count() { return blockDim.x * blockDim.y; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_index() { return thread_index() / kWarpSize; }

__device__ __forceinline__ double warp_max(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Largest value of any thread. Two barriers: what was written before it may be read after it.
__device__ inline double block_max(const BlockMatrix& m, double value) {
  value = warp_max(value);
  if (lane_index() == 0) m.scalars[warp_index()] = value;
  __syncthreads();
  double largest = m.scalars[0];
  for (int i = 1; i < thread_count() / kWarpSize; ++i) largest = m.scalars[i] > largest ? m.scalars[i] : largest;
  __syncthreads();
  return largest;
}

// Sum of x[0 .. n), by each warp for itself.
__device__ inline double sum_of(const double* x, int n) {
  double sum = 0;
  for (int i = lane_index(); i < n; i += kWarpSize) sum += x[i];
  return warp_sum(sum);
}

// Sum of the parts of row i.
__device__ __forceinline__ double parts_sum(const BlockMatrix& m, int i) {
  const double* p = m.partial + i;
  return (p[0] + p[m.capacity]) + (p[2 * m.capacity] + p[3 * m.capacity]);
}

// partial = A v over the rows and columns from `first` on. No barrier: the caller's.
__device__ inline void multiply(const BlockMatrix& m, int first, int n) {
  const int i = threadIdx.x, part = threadIdx.y;
  if (i < first || i >= n) return;
  const double* row = m.a + packed_row(i);
  double sum = 0;
  int j = first + ((part - first) & (kParts - 1));
  for (; j <= i; j += kParts) sum += row[j] * m.v[j];
  for (; j < n; j += kParts) sum += m.a[packed_row(j) + i] * m.v[j];
  m.partial[part * m.capacity + i] = sum;
}

constexpr double kNegligibleSquare = 1e-200;  // of entries near 1: far below every rounding, above underflow

// The reflection that clears column k below the subdiagonal, by one warp: v = (head + sign(head) norm, tail), and
// returns beta = 2 / v'v, or 0 if there is nothing to clear. The tail is summed apart: beside a head 1e8 times larger
// its square is lost, but not its effect on eigenvalues.
__device__ inline double make_reflector(const BlockMatrix& m, int k, int n) {
  double tail = 0;
  for (int j = lane_index(); j < n; j += kWarpSize) {
    if (j < k + 2) continue;
    const double x = m.a[packed_row(j) + k];
    m.v[j] = x;
    tail += x * x;
  }
  tail = warp_sum(tail);
  const double head = m.a[packed_row(k + 1) + k], squared = tail + head * head;
  const bool negligible = squared < kNegligibleSquare;
  const double norm = sqrt(squared);
  if (lane_index() == 0) {
    m.v[k + 1] = head + copysign(norm, head);
    m.diagonal[k] = m.a[packed_row(k) + k];
    m.squares[k] = negligible ? 0.0 : squared;
  }
  return negligible || tail == 0 ? 0.0 : 1 / (norm * (norm + fabs(head)));
}

// w = beta A v - (beta^2 / 2) (v' A v) v from the parts of A v, by one warp: A -= v w' + w v' is the reflection.
__device__ inline void make_update(const BlockMatrix& m, double beta, int k, int n) {
  double dot = 0;
  for (int j = lane_index(); j < n; j += kWarpSize) {
    if (j <= k) continue;
    const double w = beta * parts_sum(m, j);
    m.w[j] = w;
    dot += m.v[j] * w;
  }
  const double shift = -0.5 * beta * warp_sum(dot);
  for (int j = lane_index(); j < n; j += kWarpSize)
    if (j > k) m.w[j] += shift * m.v[j];
}

// A -= v w' + w v' over the rows and columns from `first` on.
__device__ inline void rank_two_update(const BlockMatrix& m, int first, int n) {
  const int i = threadIdx.x;
  if (i < first || i >= n) return;
  double* row = m.a + packed_row(i);
  const double v = m.v[i], w = m.w[i];
  for (int j = first + ((int(threadIdx.y) - first) & (kParts - 1)); j <= i; j += kParts)
    row[j] -= v * m.w[j] + w * m.v[j];
}

// Householder reduction of m.a, which is destroyed.
__device__ inline void tridiagonalise(const BlockMatrix& m, int n) {
  for (int k = 0; k + 1 < n; ++k) {
    double* shared_beta = m.scalars + k % 2;  // two by turns: without a reflection one barrier alone is between them
    if (warp_index() == 0) {
      const double made = make_reflector(m, k, n);
      if (lane_index() == 0) *shared_beta = made;
    }
    __syncthreads();
    const double beta = *shared_beta;
    if (beta == 0) continue;
    multiply(m, k + 1, n);
    __syncthreads();
    if (warp_index() == 0) make_update(m, beta, k, n);
    __syncthreads();
    rank_two_update(m, k + 1, n);
    __syncthreads();
  }
  if (thread_index() == 0) {
    m.diagonal[n - 1] = m.a[packed_row(n - 1) + n - 1];
    m.squares[n - 1] = 0;
  }
  __syncthreads();
}

// How many eigenvalues of the tridiagonal matrix are less than x: the signs of the pivots of T - x. In IEEE arithmetic
// the count never falls where x rises (Kahan). A pivot near zero is taken for a negative one that does not overflow.
__device__ inline int sturm_count(const double* diagonal, const double* squares, int n, double x) {
  constexpr double kSmallestPivot = 0x1p-900;
  int count = 0;
  double pivot = 1, square = 0;
  for (int i = 0; i < n; ++i) {
    pivot = (diagonal[i] - x) - square / pivot;
    if (fabs(pivot) < kSmallestPivot) pivot = -kSmallestPivot;
    count += pivot < 0;
    square = squares[i];
  }
  return count;
}

constexpr int kPassesAtMost = 48;           // 5^48 = 2^111 times narrower: a safety net
constexpr double kSmallestWidth = 0x1p-80;  // of an interval, in units of the largest row sum
constexpr double kFloatWidth = 0x1p-40;     // of an interval, in units of its ends, for a float32 result
constexpr double kDoubleWidth = 0x1p-51;    // and for a float64 result: two or three neighbours

// Eigenvalue number thread_index() / 4, ascending, by four threads: each pass counts at four points of the interval and
// keeps one fifth. Every eigenvalue starts from one interval, and which fifth is kept depends on the counts and falls
// nowhere as the number rises: so the results are in order, rounding or not.
__device__ inline void bisect(const BlockMatrix& m, int n, double width) {
  static_assert(kParts == 4 && kWarpSize % 4 == 0, "four threads of one warp per eigenvalue");
  const int number = thread_index() / 4, point = thread_index() % 4;
  const int first_lane = lane_index() / 4 * 4;
  double bound = 0;
  for (int i = thread_index(); i < n; i += thread_count()) {
    const double row = fabs(m.diagonal[i]) + sqrt(m.squares[i]) + (i > 0 ? sqrt(m.squares[i - 1]) : 0.0);
    bound = row > bound ? row : bound;
  }
  bound = block_max(m, bound) * (1 + 0x1p-30);
  double low = -bound, high = bound;
  bool searching = number < n;
  for (int pass = 0; pass < kPassesAtMost; ++pass) {
    const double largest = fabs(low) > fabs(high) ? fabs(low) : fabs(high);
    searching = searching && high - low > width * largest && high - low > kSmallestWidth * bound;
    if (!__any_sync(kAllLanes, searching)) break;
    const double step = 0.2 * (high - low);
    const bool above = searching && sturm_count(m.diagonal, m.squares, n, low + (point + 1) * step) > number;
    const int votes = int(__ballot_sync(kAllLanes, above) >> first_lane) & 15;
    if (!searching) continue;
    const int fifth = votes == 0 ? 4 : __ffs(votes) - 1;  // the first point that has the eigenvalue below it
    if (fifth < 4) high = low + (fifth + 1) * step;
    if (fifth > 0) low += fifth * step;
  }
  if (number < n && point == 0) m.values[number] = 0.5 * (low + high);
  __syncthreads();
}

// Exchanges rows and columns p < q of the packed matrix. Thread x = j moves what row and column j have of them.
__device__ inline void exchange(const BlockMatrix& m, int p, int q, int n) {
  const int j = threadIdx.x;
  if (threadIdx.y == 0 && j < n && j != q) {
    double* x = m.a + (j == p ? packed(p, p) : packed(j, p));
    double* y = m.a + (j == p ? packed(q, q) : packed(j, q));
    const double kept = *x;
    *x = *y;
    *y = kept;
  }
  __syncthreads();
}

// Sorts rows and columns by their diagonal entries, largest first: then a reflection never mixes a large row into the
// smaller ones that are still to be reduced, and their eigenvalues keep their digits.
__device__ inline void sort_by_diagonal(const BlockMatrix& m, int n) {
  const int i = threadIdx.x;
  double *order = m.v, *partner = m.w, *place = m.partial, *occupant = m.partial + m.capacity;
  if (threadIdx.y == 0 && i < n) {
    const double entry = fabs(m.a[packed(i, i)]);
    int rank = 0;
    for (int j = 0; j < n; ++j) {
      const double other = fabs(m.a[packed(j, j)]);
      rank += other > entry || (other == entry && j < i);
    }
    order[rank] = i;
    place[i] = occupant[i] = i;
  }
  __syncthreads();
  if (thread_index() == 0) {  // partner[t]: what position t is exchanged with, given the exchanges before it
    for (int t = 0; t < n; ++t) {
      const int wanted = int(order[t]), from = int(place[wanted]), evicted = int(occupant[t]);
      partner[t] = from;
      occupant[from] = evicted;
      place[evicted] = from;
    }
  }
  __syncthreads();
  for (int t = 0; t < n; ++t) {
    const int other = int(partner[t]);
    if (other != t) exchange(m, t, other, n);
  }
}

// Scales m.a by a power of two so that its largest entry lies in [1/2, 1), sorts it if it is graded, and returns what
// to multiply the eigenvalues by; NaN if an entry is not finite, 0 for a zero matrix.
__device__ inline double normalise(const BlockMatrix& m, int n) {
  double largest = 0;
  bool finite = true;
  for (int t = thread_index(); t < packed_row(n); t += thread_count()) {
    const double x = fabs(m.a[t]);
    finite = finite && is_finite(x);
    largest = x > largest ? x : largest;
  }
  if (!__syncthreads_and(finite)) return NAN;
  largest = block_max(m, largest);
  if (largest == 0) return 0;
  double high = 0, low = -largest;  // of the diagonal, by each warp for itself
  for (int i = lane_index(); i < n; i += kWarpSize) {
    const double x = fabs(m.a[packed(i, i)]);
    high = x > high ? x : high;
    low = -x > low ? -x : low;
  }
  high = warp_max(high);
  low = -warp_max(low);
  __syncthreads();
  int exponent = 0;
  frexp(largest, &exponent);
  const double down = ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
  for (int t = thread_index(); t < packed_row(n); t += thread_count()) m.a[t] *= down;
  __syncthreads();
  if (high > 1024 * low) sort_by_diagonal(m, n);
  return 1 / down;
}

// The eigenvalues of m.a, which is destroyed, are m.values times the result. NaN if an entry is not finite, 0 for a
// zero matrix or none; then m.values is not written. `width`: kFloatWidth or kDoubleWidth.
__device__ inline double solve(const BlockMatrix& m, int n, double width) {
  if (n == 0) return 0;
  const double scale = normalise(m, n);
  if (!(scale > 0)) return scale;
  tridiagonalise(m, n);
  bisect(m, n, width);
  return scale;
}

}  // namespace rmtkernels
