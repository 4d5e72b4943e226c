// Eigenvalues of many small symmetric matrices, and the descriptors made of them. Compiled once per instruction set.
// The solver is in small_eigenvalues.h; here Gram matrices are scaled, centred and joined for it. All of it is float64.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/small_eigenvalues.h"
#include "rmtkernels/sliding_window.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

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

GramSums gram_sums(const float* gram, int rows, int window) {
  GramSums s;
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

GramSums normalised_sums(const float* gram, const double* inverse_norm, int rows, int window) {
  GramSums s;
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

// Fills `a` with the window's Gram matrix (one layer's, or the joined one); the overlap is left to the caller.
WindowFacts load_window(const DescriptorArgs& args, double* a, int64_t problem, int rows) {
  const int window = int(args.window);
  const int64_t size = args.window * args.window;
  const bool scaled = args.joint == kJointTrace;
  FactSums facts;
  double weights[kTogether], inverse_norm[kMaxWindow];
  const float* grams[kTogether];
  int count = 0;
  const int64_t first = args.joint == kPerLayer ? problem / args.batch : 0;
  const int64_t last = args.joint == kPerLayer ? first + 1 : args.layers;
  for (int64_t layer = first; layer < last; ++layer) {
    const float* gram = args.gram + (layer * args.batch + problem % args.batch) * size;
    GramSums sums = gram_sums(gram, rows, window);
    const double raw_trace = centred_trace(sums, rows, args.center);
    if (args.normalize) {
      for (int i = 0; i < rows; ++i) inverse_norm[i] = inverse_rms(double(gram[i * window + i]), args.dim);
      sums = normalised_sums(gram, inverse_norm, rows, window);
    }
    const double trace = args.normalize ? centred_trace(sums, rows, args.center) : raw_trace;
    const double weight = scaled ? 1 / trace : 1.0;
    if (trace != 0 && args.normalize) add_normalised_gram(a, gram, inverse_norm, weight, rows, window);
    if (trace != 0 && !args.normalize) grams[count] = gram, weights[count++] = weight;
    if (count == kTogether || layer + 1 == last) add_grams(a, grams, weights, count, rows, window), count = 0;
    facts.add(raw_trace, sums, rows, args.dim);
  }
  if (args.center) center_gram(a, rows);
  return facts.facts(last - first, rows, args.dim, scaled);
}

// Overlap of the window's covariance with that of its rows but the newest, from the (centred) Gram matrix a. Less the
// mean of the others, a row is y_i + f y_new with f = 1 / (rows - 1) (0 if not centred): so tr(S S') and |S'|^2 are the
// squares of a_ij + f a_nj and of a_ij + f (a_in + a_nj) + f^2 a_nn, summed without cancellation.
double overlap_without_newest(const double* a, int64_t seen, int rows, bool center, int64_t window) {
  if (rows < 2) return 0.0;
  const int ld = round_up4(rows), newest = int((seen - 1) % window);
  const double f = center ? 1.0 / (rows - 1) : 0.0;
  const double* added = a + newest * ld;
  alignas(32) double others[kMaxWindow] = {};
  for (int j = 0; j < rows; ++j) others[j] = j == newest ? 0.0 : 1.0;
  f64x4 squares = splat(0), cross = splat(0), rest = splat(0);
  for (int i = 0; i < rows; ++i) {
    const f64x4 shift = splat(f * (added[i] + f * added[newest])), in = splat(others[i]);
    for (int j = 0; j < ld; j += 4) {
      const f64x4 entry = load4(a + i * ld + j), mixed = fma(splat(f), load4(added + j), entry);
      const f64x4 without = mixed + shift;
      squares = fma(entry, entry, squares);
      cross = fma(in * mixed, mixed, cross);
      rest = fma(in * load4(others + j) * without, without, rest);
    }
  }
  return covariance_overlap(lane_sum(squares), lane_sum(cross), lane_sum(rest));
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
