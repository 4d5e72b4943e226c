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

// Sums over the spectrum of one window that has energy: p_i = lambda_i / trace.
struct Moments {
  double entropy = 0, squares = 0, cubes = 0, enrichment = 0;  // sums of -p ln p, p^2, (n p - 1)^3, cumulated p
};

RMT_HD Moments spectral_moments(const double* lambda, int n, double trace, double* log_share) {
  Moments m;
  double cumulated = 0;
  for (int i = 0; i < n; ++i) {
    const double p = lambda[i] / trace, deviation = n * p - 1.0;
    log_share[i] = p > 0 ? std::log(p) : -1e3;  // zero: below every bin
    m.entropy -= p > 0 ? p * log_share[i] : 0.0;
    m.squares += p * p;
    m.cubes += deviation * deviation * deviation;
    m.enrichment += cumulated += p;
  }
  return m;
}

// Kullback-Leibler divergence of the histogram of ln x_i, i < rank, from the law's. Continuous: a value's mass is
// shared between the two points it lies between.
RMT_HD double histogram_divergence(const double* log_share, double log_scale, int rank, const double* log_law) {
  double mass[kBins] = {};
  for (int i = 0; i < rank; ++i) {
    double position = (log_share[i] + log_scale - kBinStart) / kBinStep;
    position = position > 0 ? (position < kBins - 1 ? position : kBins - 1) : 0;
    const int bin = position < kBins - 2 ? int(position) : kBins - 2;
    mass[bin] += 1.0 - (position - bin);
    mass[bin + 1] += position - bin;
  }
  double divergence = 0;
  for (int k = 0; k < kBins; ++k)
    if (mass[k] > 0) divergence += mass[k] / rank * (std::log(mass[k] / rank) - log_law[k]);
  return divergence;
}

// Wasserstein-1 distance, in units of sigma^2, of the eigenvalues that are not structurally zero from the law's means
// over as many cells of equal mass.
RMT_HD double wasserstein(const double* lambda, double variance, int rank, const double* cells) {
  double distance = 0;
  for (int i = 0; i < rank; ++i) distance += std::fabs(lambda[i] / variance - cells[i]);
  return distance / rank;
}

// What the eigenvalues do not know: they are those of a window that was centred and perhaps scaled.
struct WindowFacts {
  double log_trace, mean_share, overlap;
};

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

// All descriptors of n eigenvalues in descending order, none negative. An absent eigenvalue has share 0 and ratio 1; a
// window without energy has ratios 1 and 0 for all else but the facts. `table` is described above.
RMT_HD void spectral_descriptors(const double* lambda, int n, int64_t dim, int64_t window, int noise,
                                 const double* table, const WindowFacts& facts, float* out) {
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += lambda[i];
  if (!(trace > 0)) return empty_descriptors(facts, out);
  const double floor = kResolution * lambda[0];
  double top = 0;
  for (int i = 0; i < kLeading; ++i) {
    const double here = i < n ? lambda[i] : 0.0, next = i + 1 < n ? lambda[i + 1] : 0.0;
    out[kShare + i] = float(here / trace);
    top += here / trace;
    if (i + 1 < kLeading)
      out[kRatio + i] = i + 1 >= n ? 1.0f : float((here > floor ? here : floor) / (next > floor ? next : floor));
  }
  double log_share[kMaxWindow];
  const Moments m = spectral_moments(lambda, n, trace, log_share);
  const double* law = law_row(table, n, window);
  const int rank = spectral_rank(n, dim);
  const double variance = noise_variance(lambda, n, dim, noise, trace, law);
  const double middle = median(lambda, rank), spread = n * m.squares - 1.0;
  const double regular = (spread > 0 ? spread : 0.0) + kResolution * kResolution;
  const double statistic = (double(dim) * lambda[0] / variance - law[kLawCenter]) / law[kLawScale];
  const double edge = upper_edge(variance, n, dim);
  int above = 0;
  for (int i = 0; i < n; ++i) above += lambda[i] > edge;
  out[kShareTop5] = float(top);
  out[kLogTrace] = float(facts.log_trace);
  out[kMeanShare] = float(facts.mean_share);
  out[kEntropy] = float(m.entropy);
  out[kParticipation] = float(1.0 / m.squares);
  out[kVariance] = float(spread > 0 ? spread : 0.0);
  out[kSkewness] = float(m.cubes / n / (regular * std::sqrt(regular)));
  out[kLogMedian] = float(std::log((middle > floor ? middle : floor) / trace * n));
  out[kEarlyEnrichment] = float((2.0 * m.enrichment - (n + 1)) / n);
  out[kMpKl] = float(histogram_divergence(log_share, std::log(trace / variance), rank, law + kLawBins));
  out[kMpWasserstein] = float(std::log1p(wasserstein(lambda, variance, rank, law + kLawCells)));
  out[kTracyWidom] = float(std::asinh(statistic));
  out[kTracyWidomLogSurvival] = float(tracy_widom_log_survival(table, statistic));
  out[kOverlap] = float(facts.overlap);
  out[kAboveEdge] = float(above);
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
