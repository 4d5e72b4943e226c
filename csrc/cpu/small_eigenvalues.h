// All eigenvalues of up to eight small symmetric matrices at once, in float64.
//
// Float64, because activations have eigenvalues six and more orders of magnitude apart, and an error of one float32
// rounding of the largest would drown the small ones. Matrices are first reduced to tridiagonal form by Householder
// reflections: small ones four at a time, one to a SIMD lane, larger ones one by one, vectorised within the matrix.
// Then several tridiagonal matrices of one size, one to a lane, go through the root-free QL iteration side by side.
// Lanes never mix: a matrix gives the same bits alone.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/simd.h"
#include "rmtkernels/spectrum.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

// A subdiagonal entry this much smaller than its neighbours on the diagonal is taken for zero. It moves an eigenvalue
// by about its square, and by itself at worst: a float64 rounding, or next to nothing of a float32 one.
constexpr double kDoubleTolerance = 0x1p-53, kFloatTolerance = 0x1p-40;
constexpr double kNegligible = 1e-200;  // of the square of the largest entry: far below every rounding, above underflow
constexpr int kMaxSweeps = 60;          // per eigenvalue; two are usual, and without convergence it becomes NaN

RMT_INLINE int round_up4(int n) { return (n + 3) & ~3; }
RMT_INLINE f64x4 absolute(f64x4 x) { return (f64x4)((i64x4)x & i64x4{INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX}); }
RMT_INLINE bool any(i64x4 mask) {
#if defined(__AVX2__)
  return _mm256_movemask_pd((f64x4)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}
RMT_INLINE f64x4 square_root(f64x4 x) {
#if defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  return f64x4{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
#endif
}

// One matrix being worked on. Rows and columns beyond n are zero, so loops run over whole 4 x 4 tiles.
struct Workspace {
  alignas(32) double a[kMaxWindow * kMaxWindow];
  double sorted[kMaxWindow * kMaxWindow];
  alignas(32) double v[kMaxWindow];
  alignas(32) double w[kMaxWindow];
};

// w = A v over the tiles from `first` on.
RMT_INLINE void multiply(Workspace& s, int first, int ld) {
  for (int j = first; j < ld; j += 4) store4(s.w + j, splat(0));
  for (int i = first; i < ld; i += 4) {
    const double* a = s.a + i * ld;
    const f64x4 v0 = splat(s.v[i]), v1 = splat(s.v[i + 1]), v2 = splat(s.v[i + 2]), v3 = splat(s.v[i + 3]);
    for (int j = first; j < ld; j += 4) {
      const f64x4 even = fma(v2, load4(a + 2 * ld + j), fma(v0, load4(a + j), load4(s.w + j)));
      const f64x4 odd = fma(v3, load4(a + 3 * ld + j), v1 * load4(a + ld + j));
      store4(s.w + j, even + odd);
    }
  }
}

// A -= v w' + w v' over the tiles from `first` on.
RMT_INLINE void rank_two_update(Workspace& s, int first, int ld) {
  for (int i = first; i < ld; i += 4) {
    f64x4 v[4], w[4];
    for (int r = 0; r < 4; ++r) v[r] = splat(-s.v[i + r]), w[r] = splat(-s.w[i + r]);
    for (int j = first; j < ld; j += 4) {
      const f64x4 vj = load4(s.v + j), wj = load4(s.w + j);
      for (int r = 0; r < 4; ++r) {
        double* a = s.a + (i + r) * ld + j;
        store4(a, fma(w[r], vj, fma(v[r], wj, load4(a))));
      }
    }
  }
}

RMT_INLINE double dot(const double* x, const double* y, int first, int ld) {
  f64x4 sum = splat(0);
  for (int j = first; j < ld; j += 4) sum = fma(load4(x + j), load4(y + j), sum);
  return lane_sum(sum);
}

// Householder reduction of the symmetric s.a (both triangles, n x n, leading dimension round_up4(n)); it is destroyed.
// Writes the diagonal and the squares of the subdiagonal, `step` doubles apart and last row first: QL wants the small
// end of a graded matrix at the top.
void tridiagonalise(Workspace& s, int n, double* diagonal, double* squares, int step) {
  const int ld = round_up4(n);
  for (int k = 0; k + 1 < n; ++k) {
    diagonal[(n - 1 - k) * step] = s.a[k * ld + k];
    const int first = (k + 1) & ~3;
    for (int j = first; j < ld; j += 4) store4(s.v + j, load4(s.a + k * ld + j));
    const double head = s.v[k + 1];
    for (int j = first; j <= k + 1; ++j) s.v[j] = 0;
    // The tail is summed apart: beside a head 1e8 times larger its square is lost, but not its effect on eigenvalues.
    const double tail = dot(s.v, s.v, first, ld), squared = tail + head * head;
    const bool negligible = squared < kNegligible;
    squares[(n - 2 - k) * step] = negligible ? 0.0 : squared;
    if (negligible || tail == 0) continue;  // nothing to eliminate
    const double norm = std::sqrt(squared);
    s.v[k + 1] = head + std::copysign(norm, head);
    const double beta = 1 / (norm * (norm + std::fabs(head)));  // 2 / v'v
    multiply(s, first, ld);
    for (int j = first; j <= k; ++j) s.w[j] = 0;
    const f64x4 scale = splat(beta), shift = splat(-0.5 * beta * (beta * dot(s.v, s.w, first, ld)));
    for (int j = first; j < ld; j += 4) store4(s.w + j, fma(shift, load4(s.v + j), scale * load4(s.w + j)));
    rank_two_update(s, first, ld);
  }
  if (n > 0) diagonal[0] = s.a[(n - 1) * ld + n - 1], squares[(n - 1) * step] = 0;
}

// Up to this size matrices are reduced four at a time: the chains of sums, roots and quotients of a reflection are then
// shared, and one triangle is enough. Four larger ones would not stay near the processor.
constexpr int kSide = 32;

// Four matrices of one size n being worked on, one to a lane: entry (i, j), i <= j, at a[i * n + j].
struct SideBySide {
  f64x4 a[kSide * kSide];
  f64x4 v[kSide], w[kSide], x[kSide], y[kSide];
};

// Puts the matrix of a workspace, or zeros, into a lane.
void put(SideBySide& s, int lane, const double* matrix, int n) {
  double* const to = reinterpret_cast<double*>(s.a) + lane;
  const int ld = round_up4(n);
  for (int i = 0; i < n; ++i)
    for (int j = i; j < n; ++j) to[(i * n + j) * 4] = matrix ? matrix[i * ld + j] : 0.0;
}

// y = A x and A -= v w' + w v', first, for rows and columns from `first` on; two rows at a time.
RMT_INLINE void update_and_multiply(SideBySide& s, int first, int n) {
  for (int j = first; j < n; ++j) s.y[j] = splat(0);
  int i = first;
  for (; i + 2 <= n; i += 2) {
    f64x4 *const upper = s.a + i * n, *const lower = upper + n;
    const f64x4 v0 = -s.v[i], v1 = -s.v[i + 1], w0 = -s.w[i], w1 = -s.w[i + 1], x0 = s.x[i], x1 = s.x[i + 1];
    const f64x4 a00 = fma(v0, s.w[i], fma(w0, s.v[i], upper[i]));
    const f64x4 a01 = fma(v0, s.w[i + 1], fma(w0, s.v[i + 1], upper[i + 1]));
    const f64x4 a11 = fma(v1, s.w[i + 1], fma(w1, s.v[i + 1], lower[i + 1]));
    upper[i] = a00, upper[i + 1] = a01, lower[i + 1] = a11;
    f64x4 y0 = fma(a01, x1, fma(a00, x0, s.y[i])), y1 = fma(a11, x1, fma(a01, x0, s.y[i + 1]));
    for (int j = i + 2; j < n; ++j) {
      const f64x4 vj = s.v[j], wj = s.w[j], xj = s.x[j];
      const f64x4 a0 = fma(v0, wj, fma(w0, vj, upper[j])), a1 = fma(v1, wj, fma(w1, vj, lower[j]));
      upper[j] = a0, lower[j] = a1;
      y0 = fma(a0, xj, y0), y1 = fma(a1, xj, y1);
      s.y[j] = fma(a1, x1, fma(a0, x0, s.y[j]));
    }
    s.y[i] = y0, s.y[i + 1] = y1;
  }
  if (i < n) {
    f64x4& a = s.a[i * n + i];
    a = fma(splat(-2) * s.v[i], s.w[i], a);
    s.y[i] = fma(a, s.x[i], s.y[i]);
  }
}

// `tridiagonalise` for all four. What a reflection changes is subtracted when the next one reads the matrix.
void tridiagonalise(SideBySide& s, int n, double* diagonal, double* squares, int step) {
  for (int j = 0; j < n; ++j) s.v[j] = s.w[j] = splat(0);
  for (int k = 0; k + 1 < n; ++k) {
    const f64x4* const row = s.a + k * n;
    const f64x4 vk = -s.v[k], wk = -s.w[k];
    store4(diagonal + (n - 1 - k) * step, fma(vk, s.w[k], fma(wk, s.v[k], row[k])));
    for (int j = k + 1; j < n; ++j) s.x[j] = fma(vk, s.w[j], fma(wk, s.v[j], row[j]));
    const f64x4 head = s.x[k + 1];
    f64x4 tail = splat(0);  // apart, as above
    for (int j = k + 2; j < n; ++j) tail = fma(s.x[j], s.x[j], tail);
    const f64x4 squared = fma(head, head, tail), norm = square_root(squared);
    const i64x4 negligible = squared < splat(kNegligible), nothing = negligible | (tail == splat(0));
    store4(squares + (n - 2 - k) * step, negligible ? splat(0) : squared);
    s.x[k + 1] = head < splat(0) ? head - norm : head + norm;
    const f64x4 beta = nothing ? splat(0) : splat(1) / (norm * (norm + absolute(head)));
    update_and_multiply(s, k + 1, n);
    f64x4 product = splat(0);
    for (int j = k + 1; j < n; ++j) product = fma(s.x[j], s.y[j], product);
    const f64x4 shift = splat(-0.5) * beta * (beta * product);
    for (int j = k + 1; j < n; ++j) s.v[j] = s.x[j], s.w[j] = fma(shift, s.x[j], beta * s.y[j]);
  }
  if (n > 0) {
    store4(diagonal, fma(splat(-2) * s.v[n - 1], s.w[n - 1], s.a[n * n - 1]));
    store4(squares + (n - 1) * step, splat(0));
  }
}

// K vectors of four tridiagonal matrices each: d[i * K + k], e2[i * K + k] hold row i.
template <int K>
struct Lanes {
  f64x4 d[kMaxWindow * K];
  f64x4 e2[kMaxWindow * K];
};

// One sweep of QL in four lanes. The rational form of Pal, Walker and Kahan, with r_i = p + e2_i, c = p / r, s = e2 /
// r, gamma' = c (d_i - sigma) - s gamma and p' = gamma'^2 / c, waits for a division in every step. Written with the
// determinants w of the trailing blocks of T - sigma, nothing does:
//     w_i = (d_i - sigma) w_{i+1} - e2_i w_{i+2}          R_i = w_{i+1}^2 + e2_i R_{i+1}
//     p_i = w_i^2 / R_i    gamma_i = w_{i+1} w_i / R_i    r_i = R_i / R_{i+1}    s_i = e2_i R_{i+1} / R_i
// The recurrence of w is exact for entries of T off by a rounding, and R adds positive terms, so the sweep is as
// stable. w and R have no scale of their own: rescale() keeps them near 1.
struct Sweep {
  f64x4 sigma, gamma, w, w_before, r, r_inverse, s;
  i64x4 active;
};

constexpr int kStepsPerScale = 8;
// Where r_i is less (the matrix's largest entry is near 1), nothing couples row i to the rows behind it: the sweep
// restarts. kStepsPerScale factors of that size still fit a double.
constexpr double kDecoupled = 0x1p-110;

// Starts a sweep for eigenvalue l with Wilkinson's shift; false in all lanes that have converged. An e below 2^-60
// moves no eigenvalue by a float64 rounding of the largest.
RMT_INLINE bool start_sweep(Sweep& q, f64x4 dl, f64x4 dnext, f64x4 e2, f64x4 dlast, double tolerance) {
  const f64x4 relative = splat(tolerance * tolerance) * absolute(dl * dnext), floor = splat(0x1p-120);
  q.active = e2 > (relative > floor ? relative : floor);
  const f64x4 half = splat(0.5) * (dnext - dl), root = square_root(fma(half, half, e2));
  q.sigma = dl - e2 / (half + (half < 0 ? -root : root));
  q.gamma = q.w = dlast - q.sigma;
  q.w_before = q.r = q.r_inverse = splat(1);
  q.s = splat(0);
  return any(q.active);
}

// One step: takes row i, returns the new diagonal entry of row i + 1; `square` is the new squared entry between i + 1
// and i + 2 (0 in a sweep's first step).
RMT_INLINE f64x4 step_sweep(Sweep& q, f64x4 d, f64x4 e2, f64x4& square) {
  const f64x4 alpha = d - q.sigma, e2_r = e2 * q.r;
  f64x4 w = fma(alpha, q.w, -(e2 * q.w_before)), r = fma(e2, q.r, q.w * q.w);
  const i64x4 decoupled = r < splat(kDecoupled) * q.r;
  f64x4 inverse = splat(1) / r;
  square = q.s * (r * q.r_inverse);
  q.s = e2_r * inverse;
  if (__builtin_expect(any(decoupled), 0)) {
    const f64x4 one = splat(1), zero = splat(0);
    square = decoupled ? zero : square, q.s = decoupled ? zero : q.s;
    w = decoupled ? alpha : w, q.w = decoupled ? one : q.w;
    r = decoupled ? one : r, inverse = decoupled ? one : inverse;
  }
  const f64x4 gamma = (q.w * w) * inverse, below = q.gamma + (d - gamma);
  q.w_before = q.w, q.w = w, q.r = r, q.r_inverse = inverse, q.gamma = gamma;
  return below;
}

// Multiplies w by the power of two f that brings R = w^2-like quantities to the order of 1, and R by f^2.
RMT_INLINE void rescale(Sweep& q) {
  const i64x4 half = (i64x4)(((u64x4)q.r >> 52) + 1) >> 1;  // half the biased exponent of R
  const f64x4 down = (f64x4)((1535 - half) << 52), up = (f64x4)((half + 511) << 52);
  q.w *= down, q.w_before *= down;
  q.r *= down * down, q.r_inverse *= up * up;
}

// Root-free QL: afterwards d holds the eigenvalues, in no order. NaN counts as converged, so bad input ends too.
template <int K>
void implicit_ql(Lanes<K>& t, int n, double tolerance) {
  for (int l = 0; l + 1 < n; ++l) {
    for (int count = 0; count <= kMaxSweeps; ++count) {
      Sweep q[K];
      bool more = false;
      for (int k = 0; k < K; ++k)
        more |=
            start_sweep(q[k], t.d[l * K + k], t.d[(l + 1) * K + k], t.e2[l * K + k], t.d[(n - 1) * K + k], tolerance);
      if (!more) break;
      if (count == kMaxSweeps) {
        for (int k = 0; k < K; ++k) t.d[l * K + k] = q[k].active ? splat(NAN) : t.d[l * K + k];
        break;
      }
      for (int i = n - 2; i >= l; --i) {
        for (int k = 0; k < K; ++k) {
          f64x4 &d_below = t.d[(i + 1) * K + k], &e2_below = t.e2[(i + 1) * K + k], square;
          const f64x4 below = step_sweep(q[k], t.d[i * K + k], t.e2[i * K + k], square);
          d_below = q[k].active ? below : d_below;
          e2_below = q[k].active ? square : e2_below;  // in the first step 0, as it was
          if (i % kStepsPerScale == 0) rescale(q[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        f64x4 &e2 = t.e2[l * K + k], &d = t.d[l * K + k];
        e2 = q[k].active ? q[k].s * (q[k].w * q[k].w * q[k].r_inverse) : e2;
        d = q[k].active ? q[k].sigma + q[k].gamma : d;
      }
    }
  }
}

void sort_ascending(double* x, int n) {  // insertion: QL leaves the values nearly in order
  for (int i = 1; i < n; ++i) {
    const double value = x[i];
    int j = i;
    for (; j > 0 && x[j - 1] > value; --j) x[j] = x[j - 1];
    x[j] = value;
  }
}

// Sorts the rows and columns of s.a by their diagonal entries, largest first: then a reflection never mixes a large row
// into the smaller ones that are still to be reduced, and their eigenvalues keep their digits.
void sort_by_diagonal(Workspace& s, int n) {
  const int ld = round_up4(n);
  int order[kMaxWindow];
  for (int i = 0; i < n; ++i) {
    int j = i;
    for (; j > 0 && std::fabs(s.a[order[j - 1] * (ld + 1)]) < std::fabs(s.a[i * (ld + 1)]); --j)
      order[j] = order[j - 1];
    order[j] = i;
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) s.sorted[i * ld + j] = s.a[order[i] * ld + order[j]];
  for (int i = 0; i < n; ++i) std::memcpy(s.a + i * ld, s.sorted + i * ld, size_t(n) * sizeof(double));
}

// Scales s.a by a power of two so that its largest entry lies in [1/2, 1), sorts it if it is graded, and returns what
// to multiply the eigenvalues by; NaN if an entry is not finite, 0 for a zero matrix.
double normalise(Workspace& s, int n) {
  const int ld = round_up4(n), size = n * ld;
  f64x4 largest = splat(0), check = splat(0);
  for (int i = 0; i < size; i += 4) {
    const f64x4 x = absolute(load4(s.a + i));
    largest = x > largest ? x : largest;
    check += x - x;  // NaN as soon as one entry is NaN or infinite
  }
  if (lane_sum(check) != 0) return NAN;
  double maximum = 0;
  for (int lane = 0; lane < 4; ++lane) maximum = largest[lane] > maximum ? largest[lane] : maximum;
  if (maximum == 0) return 0;
  int exponent = 0;
  std::frexp(maximum, &exponent);
  const double down = std::ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
  for (int i = 0; i < size; i += 4) store4(s.a + i, load4(s.a + i) * splat(down));
  double low = 1, high = 0;
  for (int i = 0; i < n; ++i) {
    const double entry = std::fabs(s.a[i * (ld + 1)]);
    low = entry < low ? entry : low, high = entry > high ? entry : high;
  }
  if (high > 1024 * low) sort_by_diagonal(s, n);
  return 1 / down;
}

// Runs problems first .. first + count - 1 (count <= 4 K, all of size n) through the solver. `load(workspace, i)` fills
// the matrix of problem i, `save(i, values, scale)` takes its eigenvalues in ascending order, to be multiplied by
// scale.
template <int K, class Load, class Save>
void solve_group(int64_t first, int count, int n, double tolerance, const Load& load, const Save& save) {
  Workspace work;
  SideBySide four;
  Lanes<K> lanes;
  double scale[4 * K];
  const int ld = round_up4(n), step = 4 * K;
  double *d = reinterpret_cast<double*>(lanes.d), *e2 = reinterpret_cast<double*>(lanes.e2);
  for (int lane = 0; lane < count; ++lane) {
    for (int i = 0; i < ld * ld; i += 4) store4(work.a + i, splat(0));
    load(work.a, first + lane);
    scale[lane] = normalise(work, n);
    if (n <= kSide) {
      put(four, lane % 4, scale[lane] > 0 ? work.a : nullptr, n);
      if (lane % 4 < 3 && lane + 1 < count) continue;
      for (int idle = lane % 4 + 1; idle < 4; ++idle) put(four, idle, nullptr, n);
      tridiagonalise(four, n, d + lane / 4 * 4, e2 + lane / 4 * 4, step);
    } else if (scale[lane] > 0) {
      tridiagonalise(work, n, d + lane, e2 + lane, step);
    } else {
      for (int i = 0; i < n; ++i) d[i * step + lane] = e2[i * step + lane] = 0;
    }
  }
  for (int lane = count; lane < step; ++lane)  // zeros in an idle lane become NaN, which halves the speed of all
    for (int i = 0; i < n; ++i) d[i * step + lane] = d[i * step], e2[i * step + lane] = e2[i * step];
  implicit_ql<K>(lanes, n, tolerance);
  for (int lane = 0; lane < count; ++lane) {
    double values[kMaxWindow];
    for (int i = 0; i < n; ++i) values[i] = d[i * step + lane];
    sort_ascending(values, n);
    save(first + lane, values, scale[lane]);
  }
}

template <class Load, class Save>
void solve(int64_t first, int count, int n, double tolerance, const Load& load, const Save& save) {
  if (count > 4)
    solve_group<2>(first, count, n, tolerance, load, save);
  else
    solve_group<1>(first, count, n, tolerance, load, save);
}

}  // namespace
}  // namespace RMT_ISA
}  // namespace rmtkernels
