// Eigenvalues of many small symmetric matrices, and the descriptors made of them. Compiled once per instruction set.
//
// Everything is float64: activations have eigenvalues six and more orders of magnitude apart, and an error of one
// float32 rounding of the largest would drown the small ones. A matrix is first reduced to tridiagonal form by
// Householder reflections, vectorised within the matrix; then several tridiagonal matrices of one size, one to a SIMD
// lane, go through the root-free QL iteration side by side. Lanes never mix: a matrix gives the same bits alone.
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "rmtkernels/sliding_window.h"
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
  Lanes<K> lanes;
  double scale[4 * K];
  const int ld = round_up4(n), step = 4 * K;
  double *d = reinterpret_cast<double*>(lanes.d), *e2 = reinterpret_cast<double*>(lanes.e2);
  for (int lane = 0; lane < count; ++lane) {
    for (int i = 0; i < ld * ld; i += 4) store4(work.a + i, splat(0));
    load(work.a, first + lane);
    scale[lane] = normalise(work, n);
    if (scale[lane] > 0)
      tridiagonalise(work, n, d + lane, e2 + lane, step);
    else
      for (int i = 0; i < n; ++i) d[i * step + lane] = e2[i * step + lane] = 0;
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

template <class T>
void eigvalsh(const T* matrices, T* eigenvalues, int64_t n64, int64_t begin, int64_t end) {
  const int n = int(n64), ld = round_up4(n);
  const auto load = [=](double* a, int64_t problem) {
    const T* m = matrices + problem * n * n;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j <= i; ++j) a[i * ld + j] = a[j * ld + i] = double(m[i * n + j]);
  };
  const auto save = [=](int64_t problem, const double* values, double scale) {
    for (int i = 0; i < n; ++i) eigenvalues[problem * n + i] = T(values[i] * scale);
  };
  for (int64_t first = begin; first < end; first += 8)
    solve(first, int(end - first < 8 ? end - first : 8), n, sizeof(T) == 4 ? kFloatTolerance : kDoubleTolerance, load,
          save);
}

// The rows x rows blocks of up to kTogether Gram matrices: a += sum of weight * G.
constexpr int kTogether = 8;
void add_grams(double* a, const float* const* gram, const double* weight, int count, int rows, int window) {
  const int ld = round_up4(rows);
  for (int i = 0; i < rows; ++i) {
    int j = 0;
    for (; j + 4 <= rows; j += 4) {
      f64x4 sum = load4(a + i * ld + j);
      for (int k = 0; k < count; ++k) sum = fma(splat(weight[k]), load4(gram[k] + i * window + j), sum);
      store4(a + i * ld + j, sum);
    }
    for (; j < rows; ++j)
      for (int k = 0; k < count; ++k) a[i * ld + j] += weight[k] * double(gram[k][i * window + j]);
  }
}

// The same for one Gram matrix whose rows of activations are divided by their norms: G_ij / sqrt(G_ii G_jj).
void add_normalised_gram(double* a, const float* gram, const double* inverse_norm, double weight, int rows,
                         int window) {
  const int ld = round_up4(rows);
  for (int i = 0; i < rows; ++i) {
    const double scale = weight * inverse_norm[i];
    int j = 0;
    for (; j + 4 <= rows; j += 4) {
      const f64x4 scaled = splat(scale) * load4(inverse_norm + j);
      store4(a + i * ld + j, fma(scaled, load4(gram + i * window + j), load4(a + i * ld + j)));
    }
    for (; j < rows; ++j) a[i * ld + j] += scale * inverse_norm[j] * double(gram[i * window + j]);
  }
}

// Trace of the block and sum of all its entries.
struct Sums {
  double trace = 0, total = 0;
};

Sums gram_sums(const float* gram, int rows, int window) {
  Sums s;
  for (int i = 0; i < rows; ++i) {
    s.trace += double(gram[i * window + i]);
    f64x4 part = splat(0);
    int j = 0;
    for (; j + 8 <= rows; j += 8) part += fold(load8(gram + i * window + j));
    s.total += lane_sum(part);
    for (; j < rows; ++j) s.total += double(gram[i * window + j]);
  }
  return s;
}

Sums normalised_sums(const float* gram, const double* inverse_norm, int rows, int window) {
  Sums s;
  for (int i = 0; i < rows; ++i) {
    f64x4 part = splat(0);
    int j = 0;
    for (; j + 4 <= rows; j += 4) part = fma(load4(inverse_norm + j), load4(gram + i * window + j), part);
    double sum = lane_sum(part);
    for (; j < rows; ++j) sum += inverse_norm[j] * double(gram[i * window + j]);
    s.total += inverse_norm[i] * sum;
    s.trace += inverse_norm[i] * inverse_norm[i] * double(gram[i * window + i]);
  }
  return s;
}

// Inverse norms of the rows, times sqrt(dim): their mean square becomes 1. A zero row stays one.
void inverse_norms(double* inverse_norm, const float* gram, int rows, int window, int64_t dim) {
  for (int i = 0; i < rows; ++i) {
    const double square = double(gram[i * window + i]);
    inverse_norm[i] = square > 0 || square != square ? std::sqrt(double(dim) / square) : 0.0;
  }
}

// Trace of the block, centred or not. Centring subtracts the mean row of the window: tr(J G J) = tr G - sum(G) / rows.
// What centring leaves of equal rows is the rounding of G: below the resolution it is taken for the zero it stands for.
double centred_trace(const Sums& sums, int rows, bool center) {
  if (!std::isfinite(sums.total)) return NAN;  // what is not finite must reach the solver
  const double centred = center && rows > 0 ? sums.trace - sums.total / rows : sums.trace;
  return centred <= (center ? kResolution * sums.trace : 0.0) ? 0.0 : centred;
}

// G -> J G J with J = I - 11'/rows: the Gram matrix of the rows less their mean, at a cost of rows^2.
void center_gram(double* a, int rows) {
  const int ld = round_up4(rows);
  double mean[kMaxWindow], total = 0;
  for (int i = 0; i < rows; ++i) {
    f64x4 sum = splat(0);
    for (int j = 0; j < ld; j += 4) sum += load4(a + i * ld + j);
    mean[i] = lane_sum(sum) / rows;
    total += mean[i];
  }
  total /= rows;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < rows; ++j) a[i * ld + j] += (total - mean[i]) - mean[j];
}

double log_trace(double trace, double dim) {
  const double mean_square = trace / dim;
  return std::log(mean_square > kSmallestTrace ? mean_square : kSmallestTrace);
}

// Share of the rows' energy that is in their mean: rows |mean|^2 / sum of |row|^2.
double mean_share(double total, double trace, int rows) {
  if (!(trace > 0)) return 0.0;
  const double share = total / (rows * trace);
  return share > 0 ? (share < 1 ? share : 1.0) : 0.0;
}

// Fills `a` with the window's Gram matrix (one layer's, or the joined one); the overlap is left to the caller.
WindowFacts load_window(const DescriptorArgs& args, double* a, int64_t problem, int rows) {
  const int window = int(args.window);
  const int64_t size = args.window * args.window;
  const bool scaled = args.joint == kJointTrace;
  double logs = 0, traces = 0, shares = 0, total = 0, energy = 0, weights[kTogether], inverse_norm[kMaxWindow];
  const float* grams[kTogether];
  int count = 0;
  const int64_t first = args.joint == kPerLayer ? problem / args.batch : 0;
  const int64_t last = args.joint == kPerLayer ? first + 1 : args.layers;
  for (int64_t layer = first; layer < last; ++layer) {
    const float* gram = args.gram + (layer * args.batch + problem % args.batch) * size;
    Sums sums = gram_sums(gram, rows, window);
    const double raw_trace = centred_trace(sums, rows, args.center);
    if (args.normalize) {
      inverse_norms(inverse_norm, gram, rows, window, args.dim);
      sums = normalised_sums(gram, inverse_norm, rows, window);
    }
    const double trace = args.normalize ? centred_trace(sums, rows, args.center) : raw_trace;
    const double weight = scaled ? 1 / trace : 1.0;
    if (trace != 0 && args.normalize) add_normalised_gram(a, gram, inverse_norm, weight, rows, window);
    if (trace != 0 && !args.normalize) grams[count] = gram, weights[count++] = weight;
    if (count == kTogether || layer + 1 == last) add_grams(a, grams, weights, count, rows, window), count = 0;
    traces += raw_trace;
    logs += log_trace(raw_trace, double(args.dim));
    total += sums.total, energy += sums.trace;
    shares += mean_share(sums.total, sums.trace, rows);
  }
  if (args.center) center_gram(a, rows);
  const double layers = double(last - first);
  if (scaled) return {logs / layers, shares / layers, 0.0};
  return {log_trace(traces, double(args.dim) * layers), mean_share(total, energy, rows), 0.0};
}

// Overlap of the window's covariance with that of its rows but the newest.
double overlap_without_newest(const double* a, int64_t seen, int rows, bool center, int64_t window) {
  if (rows < 2) return 0.0;
  const int ld = round_up4(rows), newest = int((seen - 1) % window);
  f64x4 squares = splat(0), column = splat(0);
  for (int i = 0; i < rows * ld; i += 4) squares = fma(load4(a + i), load4(a + i), squares);
  for (int j = 0; j < ld; j += 4) column = fma(load4(a + newest * ld + j), load4(a + newest * ld + j), column);
  return covariance_overlap(lane_sum(squares), lane_sum(column), a[newest * (ld + 1)], rows, center);
}

int rows_of(const DescriptorArgs& args, int64_t problem) {
  const int64_t seen = args.seen[problem % args.batch * args.seen_stride];
  return seen > 0 ? int(window_rows(seen, args.window)) : 0;
}

}  // namespace

void eigvalsh_f32(const float* m, float* w, int64_t n, int64_t begin, int64_t end) { eigvalsh(m, w, n, begin, end); }
void eigvalsh_f64(const double* m, double* w, int64_t n, int64_t begin, int64_t end) { eigvalsh(m, w, n, begin, end); }

void descriptors(const DescriptorArgs& args, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end;) {
    const int rows = rows_of(args, first), n = degrees_of_freedom(rows, args.center);
    int count = 1;  // windows still filling up are solved apart: lanes share one size
    while (count < 8 && first + count < end && rows_of(args, first + count) == rows) ++count;
    const int64_t dim = args.joint == kPerLayer ? args.dim : args.dim * args.layers;
    WindowFacts facts[8];
    const auto load = [&](double* a, int64_t problem) {
      WindowFacts& window = facts[problem - first] = load_window(args, a, problem, rows);
      const int64_t seen = args.seen[problem % args.batch * args.seen_stride];
      window.overlap = overlap_without_newest(a, seen, rows, args.center, args.window);
    };
    const auto save = [&](int64_t problem, const double* values, double scale) {
      const int64_t layer = problem / args.batch, sequence = problem % args.batch;
      float* eigenvalues =
          args.eigenvalues + layer * args.eigenvalues_stride[0] + sequence * args.eigenvalues_stride[1];
      float* out = args.descriptors + layer * args.descriptors_stride[0] + sequence * args.descriptors_stride[1];
      double lambda[kMaxWindow];
      for (int i = 0; i < n; ++i) {
        const double value = values[rows - 1 - i] * scale / double(dim);
        lambda[i] = value < 0 ? 0.0 : value;
      }
      for (int i = 0; i < args.window; ++i) eigenvalues[i] = i < n ? float(lambda[i]) : 0.0f;
      if (scale == scale)
        spectral_descriptors(lambda, n, dim, args.window, args.noise, args.laws, facts[problem - first], out);
      else
        for (int i = 0; i < kDescriptors; ++i) out[i] = NAN;
    };
    solve(first, count, rows, kFloatTolerance, load, save);
    first += count;
  }
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
