// covariance: the rules every backend shares.
//
// A state is the weighted mean and the scatter matrix S = sum of w (x - mean)(x - mean)^T of the rows seen so far. Two
// disjoint samples a and b combine without another look at their rows (Chan, Golub, LeVeque 1979):
//
//   S = S_a + S_b + (W_a W_b / (W_a + W_b)) d d^T,  mean = mean_a + (W_b / (W_a + W_b)) d,  d = mean_b - mean_a
//
// A row is rejected if its squared norm is not finite in the dtype of S (NaN, Inf, overflow).
#pragma once

#include "rmtkernels/portability.h"

namespace rmtkernels {

// Entries of `totals`, float64.
enum CovarianceTotal : int {
  kTotalWeight = 0,    // sum of the weights; 0: mean and scatter mean nothing yet and are not read
  kTotalSquares = 1,   // sum of the squared weights
  kTotalRows = 2,      // rows accepted
  kTotalRejected = 3,  // rows skipped because they were not finite
  kTotalDecays = 4,    // updates that decayed what was there before
  kCovarianceTotals = 5
};

inline namespace RMT_ISA {

// What the squared difference of the two means counts for.
RMT_HD double between_weight(double weight_a, double weight_b) { return weight_a * (weight_b / (weight_a + weight_b)); }

}  // namespace RMT_ISA
}  // namespace rmtkernels
