// spectrum: from the eigenvalues of a window's Gram matrix to its spectral descriptors.
//
// Conventions (docs/conventions.md): G is the N x N Gram matrix of the rows of one window and D their width. The
// eigenvalues are lambda = eig(G / D), lambda_1 >= lambda_2 >= ... A centred window loses one degree of freedom, so its
// structural zero is dropped: n = rows - 1 eigenvalues, else n = rows. This is the dual form: the noise bulk of n
// eigenvalues of D-dimensional rows follows Marchenko-Pastur with ratio q = n / D.
#pragma once

#include <cmath>

#include "rmtkernels/portability.h"

namespace rmtkernels {

constexpr int kMaxWindow = 128;
constexpr int kLeading = 5;

// Position of each descriptor in the output; rmtkernels/ops/spectrum.py has the same list by name.
enum Descriptor : int {
  kShare = 0,                                // lambda_i / trace, i = 1..5
  kShareTop5 = kShare + kLeading,            // their sum
  kRatio = kShareTop5 + 1,                   // lambda_i / lambda_{i+1}, i = 1..4
  kLogTrace = kRatio + kLeading - 1,         // ln of the sum of eigenvalues, before anything is scaled
  kMeanShare = kLogTrace + 1,                // share of the rows' energy that is in their mean
  kEntropy = kMeanShare + 1,                 // -sum p ln p, p = lambda / trace, in nats
  kParticipation = kEntropy + 1,             // 1 / sum p^2
  kVariance = kParticipation + 1,            // of lambda / mean
  kSkewness = kVariance + 1,                 // of lambda
  kLogMedian = kSkewness + 1,                // ln of median / mean
  kEarlyEnrichment = kLogMedian + 1,         // (2 / n) sum_k (p_1 + ... + p_k - k / n)
  kMpKl = kEarlyEnrichment + 1,              // Kullback-Leibler divergence from the Marchenko-Pastur law, on a log grid
  kMpWasserstein = kMpKl + 1,                // ln(1 + W1 / sigma^2), W1 the distance to that law
  kTracyWidom = kMpWasserstein + 1,          // asinh of the Tracy-Widom statistic of lambda_1
  kTracyWidomLogSurvival = kTracyWidom + 1,  // ln of the probability that noise exceeds it
  kOverlap = kTracyWidomLogSurvival + 1,     // cosine between this covariance and the one without the newest row
  kAboveEdge = kOverlap + 1,                 // how many eigenvalues exceed the Marchenko-Pastur edge
  kDescriptors = kAboveEdge + 1
};

// How the layers of a sequence make one spectrum.
enum JointSpectrum : int {
  kPerLayer = 0,   // they do not: one spectrum each
  kJointRaw = 1,   // sum of the layers' Gram matrices: the Gram matrix of the concatenated activations
  kJointTrace = 2  // the same after each has been divided by its own trace
};

// Estimator of the noise variance.
enum Noise : int {
  kNoiseMedian = 0,  // median eigenvalue over the law's median
  kNoiseTrace = 1    // mean eigenvalue
};

// One call: a problem is a layer of a sequence, or a sequence alone if its layers are joined.
struct DescriptorArgs {
  const float* gram;    // (layers, batch, window, window)
  const int64_t* seen;  // rows seen, one per sequence, `seen_stride` apart
  const double* laws;   // law_table_size(window): described below
  float* descriptors;   // [layer][sequence][descriptor]
  float* eigenvalues;   // [layer][sequence][window], descending
  int64_t seen_stride;
  int64_t descriptors_stride[2];
  int64_t eigenvalues_stride[2];
  int64_t layers, batch, window, dim;
  int joint;  // JointSpectrum
  int noise;  // Noise
  bool center;
  bool normalize;  // rows of activations to mean square 1 first
};

// The table of laws that rmtkernels/ops/law_table.py makes for one window and width: first ln survival of Tracy-Widom
// at kTracyWidomStart + i kTracyWidomStep, then for n = 0 .. window eigenvalues a row of
//   median of the Marchenko-Pastur law | centre and scale of D lambda_1 | ln of the law's histogram | its cell means.
constexpr int kTracyWidomPoints = 338;
constexpr double kTracyWidomStart = -9.0, kTracyWidomStep = 0.0625;
// Histogram of ln(lambda / sigma^2): points kBinStart + k kBinStep, mass shared linearly between the two neighbours.
constexpr int kBins = 64;
constexpr double kBinStart = -4.0, kBinStep = 0.25;
enum LawColumn : int { kLawMedian = 0, kLawCenter = 1, kLawScale = 2, kLawBins = 3, kLawCells = kLawBins + kBins };

inline namespace RMT_ISA {

// A float32 Gram matrix resolves eigenvalues down to about 3e-7 lambda_1. What is smaller than this share of lambda_1
// is taken for zero where a quotient or a count would otherwise show rounding.
constexpr double kResolution = 1.0 / (1 << 20);
constexpr double kSmallestTrace = 1.1754943508222875e-38;  // ln of a zero window's trace must be a number

RMT_HD int64_t law_table_size(int64_t window) { return kTracyWidomPoints + (window + 1) * (kLawCells + window); }

// The row of the table for n eigenvalues.
RMT_HD const double* law_row(const double* table, int n, int64_t window) {
  return table + kTracyWidomPoints + n * (kLawCells + window);
}

RMT_HD int degrees_of_freedom(int64_t rows, bool center) { return int(center && rows > 0 ? rows - 1 : rows); }

// Eigenvalues that are not structurally zero.
RMT_HD int spectral_rank(int n, int64_t dim) { return n < dim ? n : int(dim); }

// Median of the eigenvalues that are not structurally zero; there is at least one.
RMT_HD double median(const double* lambda, int rank) { return 0.5 * (lambda[(rank - 1) / 2] + lambda[rank / 2]); }

// Upper edge of the Marchenko-Pastur bulk of n eigenvalues: sigma^2 (1 + sqrt q)^2.
RMT_HD double upper_edge(double variance, int n, int64_t dim) {
  const double root = 1.0 + std::sqrt(double(n) / double(dim));
  return variance * root * root;
}

// Overlap of the window's covariance S with S', that of the same window without its newest row:
// tr(S S') / (|S| |S'|) = sum_ij l_i l'_j <u_i, u'_j>^2 / ..., the overlap of the two sets of eigenvectors, weighted by
// their eigenvalues. `squares` is |S|^2, `cross` tr(S S'), `rest` |S'|^2; below the resolution there is no rest.
RMT_HD double covariance_overlap(double squares, double cross, double rest) {
  if (!(rest > kResolution * kResolution * squares)) return 0.0;
  const double overlap = cross / std::sqrt(squares * rest);
  return overlap < 1.0 ? overlap : 1.0;
}

// ln P(TW_1 > s): cubic interpolation in the table, the asymptotic series right of it (rmtkernels/laws/tracy_widom.py).
RMT_HD double tracy_widom_log_survival(const double* table, double s) {
  const double position = (s - kTracyWidomStart) / kTracyWidomStep;
  if (!(position > 1.0)) return table[1];
  if (position >= kTracyWidomPoints - 2) {
    constexpr double kLogFourRootPi = 1.9586593040445907;
    const double z = 1.0 / (s * std::sqrt(s));
    const double series =
        (((((8064605.0 / 4096 * z - 113967593.0 / 491520) * z + 68061.0 / 2048) * z - 56617.0 / 9216) * z +
          105.0 / 64) *
             z -
         41.0 / 48) *
        z;
    return -2.0 / 3.0 / z + 0.5 * std::log(z) - kLogFourRootPi + series;
  }
  const int i = int(position);
  const double t = position - i, *y = table + i - 1;
  const double a = t + 1, b = t, c = t - 1, d = t - 2;  // Lagrange on the points -1, 0, 1, 2
  return -y[0] * b * c * d / 6 + y[1] * a * c * d / 2 - y[2] * a * b * d / 2 + y[3] * a * b * c / 6;
}

// Trace of the block of a Gram matrix that is in use, and sum of all its entries.
struct GramSums {
  double trace = 0, total = 0;
};

RMT_HD bool is_finite(double x) { return x - x == 0; }

// Trace of the block, centred or not. Centring subtracts the mean row of the window: tr(J G J) = tr G - sum(G) / rows.
// What centring leaves of equal rows is the rounding of G: below the resolution it is taken for the zero it stands for.
RMT_HD double centred_trace(const GramSums& sums, int rows, bool center) {
  if (!is_finite(sums.total)) return NAN;  // what is not finite must reach the solver
  const double centred = center && rows > 0 ? sums.trace - sums.total / rows : sums.trace;
  return centred <= (center ? kResolution * sums.trace : 0.0) ? 0.0 : centred;
}

// What the rows of activations of one layer are multiplied by so that their mean square is 1. A zero row stays one.
RMT_HD double inverse_rms(double square, int64_t dim) {
  return square > 0 || square != square ? std::sqrt(double(dim) / square) : 0.0;
}

RMT_HD double log_trace(double trace, double dim) {
  const double mean_square = trace / dim;
  return std::log(mean_square > kSmallestTrace ? mean_square : kSmallestTrace);
}

// Share of the rows' energy that is in their mean: rows |mean|^2 / sum of |row|^2.
RMT_HD double mean_share(const GramSums& sums, int rows) {
  if (!(sums.trace > 0)) return 0.0;
  const double share = sums.total / (rows * sums.trace);
  return share > 0 ? (share < 1 ? share : 1.0) : 0.0;
}

// What the eigenvalues do not know: they are those of a window that was centred and perhaps scaled.
struct WindowFacts {
  double log_trace, mean_share, overlap;
};

// Gathers the facts over the layers that make one spectrum.
struct FactSums {
  double logs = 0, traces = 0, shares = 0;
  GramSums sums;

  RMT_HD void add(double raw_trace, const GramSums& layer, int rows, int64_t dim) {
    traces += raw_trace;
    logs += rmtkernels::log_trace(raw_trace, double(dim));
    sums.total += layer.total, sums.trace += layer.trace;
    shares += rmtkernels::mean_share(layer, rows);
  }

  RMT_HD WindowFacts facts(int64_t layers, int rows, int64_t dim, bool scaled) const {
    if (scaled) return {logs / double(layers), shares / double(layers), 0.0};
    return {rmtkernels::log_trace(traces, double(dim) * double(layers)), rmtkernels::mean_share(sums, rows), 0.0};
  }
};

// Memory that the descriptors of one window are worked out in.
struct DescriptorScratch {
  double* log_share;  // kMaxWindow
  double* mass;       // kBins
};

// Place of a value of given logarithm among the points of the histogram.
RMT_HD double histogram_position(double log_value) {
  const double position = (log_value - kBinStart) / kBinStep;
  return position > 0 ? (position < kBins - 1 ? position : kBins - 1) : 0;
}
RMT_HD int histogram_bin(double position) { return position < kBins - 2 ? int(position) : kBins - 2; }

// Who works the descriptors out: one thread here, the lanes of a warp in spectrum.cuh. Member `rank` of `size` takes
// every size-th value, sum() adds up what the members have and tells all, and wait() lets all see what each has
// written.
struct OneThread {
  static constexpr int size = 1, rank = 0;
  RMT_HD double sum(double x) const { return x; }
  RMT_HD void wait() const {}

  // A value's mass is shared between the two points it lies between.
  RMT_HD void histogram(const double* log_share, double log_scale, int count, double* mass) const {
    for (int k = 0; k < kBins; ++k) mass[k] = 0;
    for (int i = 0; i < count; ++i) {
      const double position = histogram_position(log_share[i] + log_scale);
      const int bin = histogram_bin(position);
      mass[bin] += 1.0 - (position - bin);
      mass[bin + 1] += position - bin;
    }
  }
};

// Sums over the spectrum of one window that has energy: p_i = lambda_i / trace.
struct Moments {
  double entropy = 0, squares = 0, cubes = 0, enrichment = 0;  // sums of -p ln p, p^2, (n p - 1)^3, cumulated p
};

template <class Team>
RMT_HD Moments spectral_moments(const Team& team, const double* lambda, int n, double trace, double* log_share) {
  Moments m;
  for (int i = team.rank; i < n; i += team.size) {
    const double p = lambda[i] / trace, deviation = n * p - 1.0;
    log_share[i] = p > 0 ? std::log(p) : -1e3;  // zero: below every bin
    m.entropy -= p > 0 ? p * log_share[i] : 0.0;
    m.squares += p * p;
    m.cubes += deviation * deviation * deviation;
    m.enrichment += (n - i) * p;  // the share p_i is in n - i of the cumulated shares
  }
  team.wait();
  return {team.sum(m.entropy), team.sum(m.squares), team.sum(m.cubes), team.sum(m.enrichment)};
}

// Kullback-Leibler divergence of the histogram of ln x_i, i < rank, from the law's. Continuous, as the histogram is.
template <class Team>
RMT_HD double histogram_divergence(const Team& team, const DescriptorScratch& scratch, double log_scale, int rank,
                                   const double* log_law) {
  team.histogram(scratch.log_share, log_scale, rank, scratch.mass);
  double divergence = 0;
  for (int k = team.rank; k < kBins; k += team.size)
    if (scratch.mass[k] > 0) divergence += scratch.mass[k] / rank * (std::log(scratch.mass[k] / rank) - log_law[k]);
  return team.sum(divergence);
}

// Wasserstein-1 distance, in units of sigma^2, of the eigenvalues that are not structurally zero from the law's means
// over as many cells of equal mass.
template <class Team>
RMT_HD double wasserstein(const Team& team, const double* lambda, double variance, int rank, const double* cells) {
  double distance = 0;
  for (int i = team.rank; i < rank; i += team.size) distance += std::fabs(lambda[i] / variance - cells[i]);
  return team.sum(distance) / rank;
}

RMT_HD void empty_descriptors(const WindowFacts& facts, float* out) {
  for (int i = 0; i < kDescriptors; ++i) out[i] = 0.0f;
  for (int i = 0; i + 1 < kLeading; ++i) out[kRatio + i] = 1.0f;
  out[kLogTrace] = float(facts.log_trace);
  out[kMeanShare] = float(facts.mean_share);
}

// Noise variance, not below the resolution, so that what is divided by it stays finite.
RMT_HD double noise_variance(const double* lambda, int n, int64_t dim, int noise, double trace, const double* law) {
  const double variance = noise == kNoiseTrace ? trace / n : median(lambda, spectral_rank(n, dim)) / law[kLawMedian];
  const double floor = kResolution * lambda[0];
  return variance > floor ? variance : floor;
}

// Shares and ratios of the leading eigenvalues.
template <class Team>
RMT_HD void leading_descriptors(const Team& team, const double* lambda, int n, double trace, float* out) {
  const double floor = kResolution * lambda[0];
  double top = 0;
  for (int i = team.rank; i < kLeading; i += team.size) {
    const double here = i < n ? lambda[i] : 0.0, next = i + 1 < n ? lambda[i + 1] : 0.0;
    out[kShare + i] = float(here / trace);
    top += here / trace;
    if (i + 1 < kLeading)
      out[kRatio + i] = i + 1 >= n ? 1.0f : float((here > floor ? here : floor) / (next > floor ? next : floor));
  }
  top = team.sum(top);
  if (team.rank == 0) out[kShareTop5] = float(top);
}

// All descriptors of n eigenvalues in descending order, none negative. An absent eigenvalue has share 0 and ratio 1; a
// window without energy has ratios 1 and 0 for all else but the facts. `table` is described above.
template <class Team>
RMT_HD void spectral_descriptors(const Team& team, const DescriptorScratch& scratch, const double* lambda, int n,
                                 int64_t dim, int64_t window, int noise, const double* table, const WindowFacts& facts,
                                 float* out) {
  double trace = 0;
  for (int i = team.rank; i < n; i += team.size) trace += lambda[i];
  trace = team.sum(trace);
  if (!(trace > 0)) {
    if (team.rank == 0) empty_descriptors(facts, out);
    return;
  }
  leading_descriptors(team, lambda, n, trace, out);
  const Moments m = spectral_moments(team, lambda, n, trace, scratch.log_share);
  const double* law = law_row(table, n, window);
  const int rank = spectral_rank(n, dim);
  const double variance = noise_variance(lambda, n, dim, noise, trace, law);
  const double divergence = histogram_divergence(team, scratch, std::log(trace / variance), rank, law + kLawBins);
  const double distance = wasserstein(team, lambda, variance, rank, law + kLawCells);
  const double edge = upper_edge(variance, n, dim);
  double above = 0;
  for (int i = team.rank; i < n; i += team.size) above += lambda[i] > edge;
  above = team.sum(above);
  if (team.rank != 0) return;
  const double floor = kResolution * lambda[0], middle = median(lambda, rank), spread = n * m.squares - 1.0;
  const double regular = (spread > 0 ? spread : 0.0) + kResolution * kResolution;
  const double statistic = (double(dim) * lambda[0] / variance - law[kLawCenter]) / law[kLawScale];
  out[kLogTrace] = float(facts.log_trace);
  out[kMeanShare] = float(facts.mean_share);
  out[kEntropy] = float(m.entropy);
  out[kParticipation] = float(1.0 / m.squares);
  out[kVariance] = float(spread > 0 ? spread : 0.0);
  out[kSkewness] = float(m.cubes / n / (regular * std::sqrt(regular)));
  out[kLogMedian] = float(std::log((middle > floor ? middle : floor) / trace * n));
  out[kEarlyEnrichment] = float((2.0 * m.enrichment - (n + 1)) / n);
  out[kMpKl] = float(divergence);
  out[kMpWasserstein] = float(std::log1p(distance));
  out[kTracyWidom] = float(std::asinh(statistic));
  out[kTracyWidomLogSurvival] = float(tracy_widom_log_survival(table, statistic));
  out[kOverlap] = float(facts.overlap);
  out[kAboveEdge] = float(above);
}

// The same by one thread, with memory of its own.
inline void spectral_descriptors(const double* lambda, int n, int64_t dim, int64_t window, int noise,
                                 const double* table, const WindowFacts& facts, float* out) {
  double log_share[kMaxWindow], mass[kBins];
  spectral_descriptors(OneThread(), {log_share, mass}, lambda, n, dim, window, noise, table, facts, out);
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
