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
  kShare = 0,                         // lambda_i / trace, i = 1..5
  kRatio = kShare + kLeading,         // lambda_i / lambda_{i+1}, i = 1..4
  kLogTrace = kRatio + kLeading - 1,  // ln of the sum of eigenvalues
  kEntropy = kLogTrace + 1,           // -sum p ln p, p = lambda / trace, in nats
  kParticipation = kEntropy + 1,      // 1 / sum p^2
  kAboveEdge = kParticipation + 1,    // how many eigenvalues exceed the Marchenko-Pastur edge
  kDescriptors = kAboveEdge + 1
};

// How the layers of a sequence make one spectrum.
enum JointSpectrum : int {
  kPerLayer = 0,   // they do not: one spectrum each
  kJointRaw = 1,   // sum of the layers' Gram matrices: the Gram matrix of the concatenated activations
  kJointTrace = 2  // the same after each has been divided by its own trace
};

inline namespace RMT_ISA {

// A float32 Gram matrix resolves eigenvalues down to about 3e-7 lambda_1. What is smaller than this share of lambda_1
// is taken for zero where a quotient or a count would otherwise show rounding.
constexpr double kResolution = 1.0 / (1 << 20);
constexpr double kSmallestTrace = 1.1754943508222875e-38;  // ln of a zero window's trace must be a number

RMT_HD int degrees_of_freedom(int64_t rows, bool center) { return int(center && rows > 0 ? rows - 1 : rows); }

// Noise variance: the median of the eigenvalues that are not structurally zero over that of the unit law at n / dim.
RMT_HD double noise_variance(const double* lambda, int n, int64_t dim, double mp_median) {
  const int rank = n < dim ? n : int(dim);
  if (rank == 0) return 0.0;
  return 0.5 * (lambda[(rank - 1) / 2] + lambda[rank / 2]) / mp_median;
}

// Upper edge of the Marchenko-Pastur bulk of n eigenvalues: sigma^2 (1 + sqrt q)^2.
RMT_HD double upper_edge(double variance, int n, int64_t dim) {
  const double root = 1.0 + std::sqrt(double(n) / double(dim));
  return variance * root * root;
}

// All descriptors of n eigenvalues in descending order, none negative. An absent eigenvalue has share 0 and ratio 1,
// and so have all of a window without energy, whose entropy and participation are 0 too. log_trace is the caller's,
// since a joint spectrum takes it before scaling.
RMT_HD void spectral_descriptors(const double* lambda, int n, int64_t dim, double mp_median, double log_trace,
                                 float* out) {
  double trace = 0, squares = 0;
  for (int i = 0; i < n; ++i) {
    trace += lambda[i];
    squares += lambda[i] * lambda[i];
  }
  const bool empty = !(trace > 0);
  double entropy = 0;
  for (int i = 0; i < n && !empty; ++i) {
    const double p = lambda[i] / trace;
    if (p > 0) entropy -= p * std::log(p);
  }
  const double floor = n > 0 ? kResolution * lambda[0] : 0.0;
  for (int i = 0; i < kLeading; ++i) {
    const double here = i < n ? lambda[i] : 0.0, next = i + 1 < n ? lambda[i + 1] : 0.0;
    out[kShare + i] = empty ? 0.0f : float(here / trace);
    if (i + 1 < kLeading)
      out[kRatio + i] =
          empty || i + 1 >= n ? 1.0f : float((here > floor ? here : floor) / (next > floor ? next : floor));
  }
  const double edge = upper_edge(noise_variance(lambda, n, dim, mp_median), n, dim);
  int above = 0;
  for (int i = 0; i < n; ++i) above += lambda[i] > edge && lambda[i] > floor;
  out[kLogTrace] = float(log_trace);
  out[kEntropy] = float(entropy);
  out[kParticipation] = empty ? 0.0f : float(trace * trace / squares);
  out[kAboveEdge] = float(above);
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
